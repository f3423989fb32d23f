"""What training waits for a checkpoint: ours beside DeepSpeed's own synchronous save_checkpoint, in one run.

python benchmarks/checkpoint.py                                 a GPT of 25 M parameters, 400 MB of states
python benchmarks/checkpoint.py --width 64 --layers 1 --quick   a small one, to see that it runs: nothing is judged
deepspeed --num_accelerators 2 benchmarks/checkpoint.py --ds_config ds_configs/zero3.json

In every round the same engine takes plain steps, saves by DeepSpeed's save_checkpoint (which neither fsyncs nor
digests), takes a step, saves by ours in the background and takes steps until that is committed, and saves by ours once
more without background. Ours stalls training by its call and by the wait for the copy before weights change; what the
steps beside the writing take longer than plain ones is a line of its own. The exit status is 1 when the stall is above
1/20 of DeepSpeed's.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "benchmarks" / "checkpoint"
RESULTS = ROOT / "benchmarks" / "results" / "checkpoint.json"
REQUIRED = 20.0
ROWS, LENGTH, VOCABULARY = 4, 128, 12_000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Stall of training by a checkpoint, ours beside DeepSpeed's save_checkpoint.",
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs" / "zero2_fp32.json", metavar="JSON")
    parser.add_argument("--width", type=int, default=512, help="of the GPT (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="of the GPT (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="rounds, of which medians are shown (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one round; the exit status is 0")
    parser.add_argument(
        "--json", nargs="?", type=Path, const=RESULTS, help=f"write the figures too (default: {RESULTS})"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_engine(arguments: argparse.Namespace, world: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig

    from pipeline.engine import Engine
    from pipeline.model import build_model
    from pipeline.recipe import OptimizerSection

    config = json.loads(arguments.ds_config.read_text()) | {
        "train_micro_batch_size_per_gpu": ROWS,
        "train_batch_size": ROWS * world.size,
        "gradient_clipping": 1.0,
        "steps_per_print": 1 << 62,
    }
    model_config = AutoConfig.for_model(
        "gpt2",
        n_layer=arguments.layers,
        n_embd=arguments.width,
        n_head=8,
        n_positions=LENGTH,
        vocab_size=VOCABULARY,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Engine(build_model(model_config, "causal", 1), OptimizerSection(lr=1e-3), config, world, 1), config


def batch_of(world: Any) -> Any:
    import numpy as np

    from pipeline.loader import to_device
    from pipeline.samples import Batch, Places

    ids = np.random.default_rng(world.rank).integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    zeros, targets = np.zeros(ROWS, dtype=np.int64), np.arange(ROWS * LENGTH)
    return to_device(
        Batch(ids, ids.reshape(-1), targets, None, LENGTH, Places(zeros, zeros, zeros), None, None), world.device
    )


def measure(arguments: argparse.Namespace, world: Any) -> dict[str, list[float]]:
    from pipeline.checkpoint import Sources
    from pipeline.checkpointer import Checkpointer
    from pipeline.ds_config import precision, zero_stage
    from pipeline.recipe import CheckpointSection

    engine, config = make_engine(arguments, world)
    batch = batch_of(world)
    steps = 0

    def step(writing: bool = False) -> tuple[float, bool]:
        """Seconds of a step, and whether any rank is writing."""
        nonlocal steps
        began = time.perf_counter()
        result = engine.train_step(steps, [batch], 1e-3, requests=(writing,))
        steps += 1
        return time.perf_counter() - began, any(result.requests)

    def checkpointer(name: str, background: bool) -> Checkpointer:
        return Checkpointer(
            engine,
            WORK / name,
            CheckpointSection(background=background, keep_last=1),
            zero_stage=zero_stage(config),
            precision=precision(config),
            sources=Sources("", "", {}),
            say=lambda _: None,
        )

    step()  # makes the optimizer's states
    found: dict[str, list[float]] = {name: [] for name in ("step", "deepspeed", "call", "copy", "beside", "waiting")}
    ours, waits = checkpointer("background", True), checkpointer("waiting", False)
    for number in range(2 if arguments.quick else arguments.repeats + 1):
        plain = [step()[0] for _ in range(3)]
        began = time.perf_counter()
        engine.deepspeed.save_checkpoint(str(WORK / "deepspeed"), tag=str(number))
        theirs = time.perf_counter() - began
        step()
        engine.before_update = ours._wait_for_copy
        before = ours.stalls.starting, ours.stalls.copying
        ours.save(steps, steps, 1e-3)
        began, taken = time.perf_counter(), 0
        while step(not ours.is_idle)[1]:
            taken += 1
        copied = ours.stalls.copying - before[1]
        beside = time.perf_counter() - began - copied - (taken + 1) * statistics.median(plain)
        ours.wait()
        began = time.perf_counter()
        waits.save(steps, steps, 1e-3)
        waited = time.perf_counter() - began
        if number:  # the first one makes folders and host memory
            values = (statistics.median(plain), theirs, ours.stalls.starting - before[0], copied, beside, waited)
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
        if world.is_first:
            shutil.rmtree(WORK / "deepspeed")
        world.barrier()
    ours.close()
    waits.close()
    found["megabytes"] = [sum(path.stat().st_size for path in (WORK / "background").rglob("*.pt")) / 1e6]
    return found


def main() -> int:
    arguments = parse()
    from pipeline.startup import init_distributed, set_environment

    set_environment()
    world = init_distributed()
    found = measure(arguments, world)
    status = 0
    if world.is_first:
        median = {name: statistics.median(values) for name, values in found.items()}
        stall = median["call"] + median["copy"]
        ratio = median["deepspeed"] / stall
        rows = [
            ("DeepSpeed's save_checkpoint", median["deepspeed"]),
            ("ours, not in the background", median["waiting"]),
            ("ours: the call", median["call"]),
            ("ours: waiting for the copy before the weights change", median["copy"]),
            ("ours: steps beside the writing, longer by", median["beside"]),
        ]
        print(f"{world.describe()}, {arguments.ds_config.name}")
        print(f"{median['megabytes']:,.0f} MB, step {median['step']:.2f} s")
        for name, seconds in rows:
            print(f"{name:<56} {seconds * 1e3:9.1f} ms  {median['deepspeed'] / max(seconds, 1e-6):8.1f}x")
        print(f"stall, call and copy: 1/{ratio:.0f} of DeepSpeed's (required 1/{REQUIRED:.0f})")
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
            content = {"machine": machine, "ds_config": arguments.ds_config.name, "median": median, "rounds": found}
            arguments.json.write_text(json.dumps(content, indent=1) + "\n")
            print(arguments.json)
        shutil.rmtree(WORK)
        status = int(ratio < REQUIRED and not arguments.quick)
    world.close()
    return status


if __name__ == "__main__":
    from pipeline.startup import leave

    leave(main())
