"""Run by the launcher: engines that save, go back and take on one another's checkpoints; what they found, as JSON.

`checkpoint_states.py FOLDER RESULTS CASE...`. A case is [name, kind, source]: an engine of a kind (below) that takes
two steps, or is at step 2 of FOLDER/source's checkpoint, and has FOLDER/name as its output_dir. It saves, takes steps 3
and 4, goes back and takes them again. FOLDER/RESULTS gets of each case {losses, again, digests, same}: losses of the
two steps, the same after going back, each rank's digest in the manifest, and whether the states after step 4 were
bitwise the same both times. The case ["bare", kind, null] is DeepSpeed alone with its checkpoints damaged: {damage:
{resumed, changed}}.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np  # noqa: E402

from pipeline.checkpointer import Checkpointer, Sources, collect, digest  # noqa: E402
from pipeline.ds_config import precision, zero_stage  # noqa: E402
from pipeline.engine import Engine  # noqa: E402
from pipeline.loader import DeviceBatch, to_device  # noqa: E402
from pipeline.model import build_model  # noqa: E402
from pipeline.recipe import CheckpointSection, OptimizerSection  # noqa: E402
from pipeline.samples import Batch, Places  # noqa: E402
from pipeline.startup import World, init_distributed, leave, set_environment  # noqa: E402

ROWS, LENGTH, VOCABULARY = 8, 12, 61
# Odd sizes, so that every way of cutting has its padding.
MODEL = {"n_layer": 2, "n_embd": 14, "n_head": 2, "n_positions": LENGTH, "vocab_size": VOCABULARY, "use_cache": False}
DROPOUT = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}


def ds_config(kind: str, world_size: int) -> tuple[dict[str, Any], OptimizerSection]:
    """kind: such as "3-bf16-Muon": ZeRO stage, precision, optimizer."""
    stage, in_precision, optimizer = kind.split("-")
    config = {
        "train_micro_batch_size_per_gpu": ROWS // world_size,
        "train_batch_size": ROWS,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
        "zero_optimization": {"stage": int(stage), "stage3_param_persistence_threshold": 50},
    }
    if in_precision == "bf16":
        config["bf16"] = {"enabled": True}
        if int(stage) > 0:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config, OptimizerSection(type=optimizer, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def rows_of(step: int, world: World) -> DeviceBatch:
    """This rank's rows of a step's eight, which are the same on any number of ranks."""
    ids = np.random.default_rng(step).integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    mine = np.array_split(ids, world.size)[world.rank]
    zeros = np.zeros(len(mine), dtype=np.int64)
    targets = np.arange(mine.size)
    batch = Batch(mine, mine.reshape(-1)[targets], targets, None, LENGTH, Places(zeros, zeros, zeros), None, None)
    return to_device(batch, world.device)


def rate(step: int) -> float:
    return 1e-3 * (1 + step)


def made(kind: str, world: World) -> tuple[Engine, dict[str, Any]]:
    from transformers import AutoConfig

    config, optimizer = ds_config(kind, world.size)
    model = build_model(AutoConfig.for_model("gpt2", **MODEL, **DROPOUT), "causal", 1)
    return Engine(model, optimizer, config, world, 1), config


def bare(folder: Path, name: str, kind: str, _: None, world: World) -> dict[str, Any]:
    """DeepSpeed alone: a flipped bit, one tag used twice with a rank killed before it wrote, and no `latest`."""
    engine, _config = made(kind, world)
    deepspeed, place = engine.deepspeed, folder / name
    found: dict[str, Any] = {}

    def loaded_after(damage: str) -> None:
        world.barrier()
        before = digest(collect(deepspeed, folder))
        path, _client = deepspeed.load_checkpoint(str(place))
        changed = any(world.gather(digest(collect(deepspeed, folder)) != before))
        found[damage] = {"resumed": path is not None, "changed": changed}

    engine.train_step(0, [rows_of(0, world)], rate(0))
    deepspeed.save_checkpoint(str(place), tag="same")
    path = next((place / "same").glob(f"*zero_pp_rank_{world.rank}_*optim_states.pt"))
    of_step_1 = path.read_bytes()
    flipped = bytearray(of_step_1)
    flipped[len(flipped) // 2] ^= 1  # of a tensor, which is nearly all of the file
    path.write_bytes(flipped)
    loaded_after("flipped")
    path.write_bytes(of_step_1)
    loaded_after("clean")
    engine.train_step(1, [rows_of(1, world)], rate(1))
    deepspeed.save_checkpoint(str(place), tag="same")
    if world.rank == 1:
        path.write_bytes(of_step_1)
    loaded_after("mixed")
    if world.is_first:
        (place / "latest").unlink()
    loaded_after("without latest")
    deepspeed.destroy()
    return found


def outcome(folder: Path, name: str, kind: str, source: str | None, world: World) -> dict[str, Any]:
    engine, config = made(kind, world)
    checkpointer = Checkpointer(
        engine,
        folder / name,
        CheckpointSection(),
        zero_stage=zero_stage(config),
        precision=precision(config),
        sources=Sources("", "", {}),
        say=print,
    )

    def train(first: int, last: int) -> tuple[list[float], str]:
        found = [engine.train_step(step, [rows_of(step, world)], rate(step)) for step in range(first, last)]
        return [result.losses.loss for result in found], digest(collect(engine.deepspeed, folder))

    if source is None:
        train(0, 2)
    else:
        checkpointer.load(folder / source / "checkpoints" / "step-00000002")
    checkpointer.save(2, 2 * ROWS, rate(1))
    losses, after = train(2, 4)
    checkpointer.wait()
    info = checkpointer.load(folder / name / "checkpoints" / "step-00000002")
    again, after_again = train(2, 4)
    checkpointer.close()
    same = all(world.gather(after == after_again))
    engine.deepspeed.destroy()
    return {"losses": losses, "again": again, "digests": info.digests, "same": same}


def main() -> None:
    folder, name, *cases = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    set_environment()
    world = init_distributed()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    results = {}
    for case in map(json.loads, cases):
        results[case[0]] = (bare if case[0] == "bare" else outcome)(Path(folder), *case, world)
    if world.is_first:
        Path(folder, name).write_text(json.dumps(results))
    world.close()
    leave(0)


if __name__ == "__main__":
    main()
