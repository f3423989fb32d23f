"""What benchmarks/engine.py runs of ours: pretrain.py itself, looked at from outside.

python our_engine.py steps RESULTS.json ARGUMENTS...    a run of pretrain.py with these arguments, step by step
python our_engine.py loop RESULTS.json ARGUMENTS...     the same, and before or after each step a bare one: the engine's
                                                        forward, backward and step on the step's own tensors
python our_engine.py sizes RESULTS.json ARGUMENTS...    no step: parameters and FLOPs of the recipe's model

RESULTS.json: `processor` and `wall`, seconds at the end of every step; `useful`, tokens that are no padding of every
step; `peak`, bytes resident at most from the end of the first step on; `gpu_peak`. In `loop`, `ours` and `bare`:
seconds of processor time of every step, the loop around ours included.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline import pretrain  # noqa: E402
from pipeline.arguments import parse_arguments  # noqa: E402
from pipeline.interruption import Interruption  # noqa: E402
from pipeline.startup import Timings, leave, set_environment  # noqa: E402


def useful_tokens(batches: Any) -> int:
    """Packed rows have no padding, but for a tail that no document fits in: it is not counted as one."""
    return sum(batch.input_ids.numel() for batch in batches)


def watch(found: dict[str, Any], bare_too: bool) -> None:
    """Makes the engine note when its steps end; with bare_too, each has a bare step beside it. Nothing is saved."""
    from pipeline import checkpoint
    from pipeline.engine import Engine
    from pipeline.objective import losses

    whole = Engine.train_step
    marks: dict[str, float] = {}

    def bare(engine: Any, batches: Any, scale: float) -> None:
        for index, batch in enumerate(batches):
            loss = losses(engine.head, batch, engine.dtype, scale).trained
            engine.deepspeed.set_gradient_accumulation_boundary(index == len(batches) - 1)
            engine.deepspeed.backward(loss, scale_wrt_gas=False)
            engine.deepspeed.step()

    def timed_bare(engine: Any, batches: Any, scale: float) -> float:
        started = time.process_time()
        bare(engine, batches, scale)
        return time.process_time() - started

    def step(engine: Any, number: int, batches: Any, learning_rate: float, **more: Any) -> Any:
        entered = time.process_time()
        if "left" in marks:  # what the loop did since the step before belongs to that one
            found["ours"][-1] += entered - marks["left"]
        found["useful"].append(useful_tokens(batches))
        scale = engine.world.size / max(1, sum(batch.target_count for batch in batches))
        if bare_too and number % 2:
            found["bare"].append(timed_bare(engine, batches, scale))
        started = time.process_time()
        result = whole(engine, number, batches, learning_rate, **more)
        found["ours"].append(time.process_time() - started)
        if bare_too and not number % 2:
            found["bare"].append(timed_bare(engine, batches, scale))
        if number == 0:
            Path("/proc/self/clear_refs").write_text("5")
        marks["left"] = time.process_time()
        found["processor"].append(marks["left"])
        found["wall"].append(time.perf_counter())
        return result

    Engine.train_step = step  # type: ignore[method-assign]
    checkpoint.save = lambda *_, **__: "none"  # type: ignore[assignment]


def sizes_of(arguments: list[str]) -> dict[str, float]:
    from pipeline.configuration import resolve
    from pipeline.data import open_data
    from pipeline.model import build_model, make_model_config, measure_model

    parsed = parse_arguments(arguments)
    recipe, _ = resolve(parsed.recipe, parsed.overrides, parsed.deepspeed_config)
    model = build_model(make_model_config(recipe, open_data(recipe).tokenizer), recipe.objective, recipe.seed)
    size = measure_model(model, recipe.objective, recipe.data.sequence_length)
    return {"parameters": size.parameters, "flops_a_token": size.flops_a_token}


def main(mode: str, results: str, *arguments: str) -> None:
    set_environment()
    found: dict[str, Any] = {"processor": [], "wall": [], "useful": [], "ours": [], "bare": []}
    if mode == "sizes":
        found = sizes_of(list(arguments))
    else:
        watch(found, bare_too=mode == "loop")
        pretrain.run(parse_arguments(list(arguments)), Timings.since_process_start(), Interruption())
        found["peak"] = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
        import torch

        found["gpu_peak"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    Path(results).write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
