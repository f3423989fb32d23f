"""Run by the launcher: trains with an average of the weights under several ds_configs; rank 0 saves what came of each.

`averages.py FOLDER CONFIG...`: FOLDER/found gets {config: {...}}, whole weights by name.
"""

import gc
import itertools
import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

from pipeline import ops  # noqa: E402
from pipeline.ds_config import zero_stage  # noqa: E402
from pipeline.ema import ema_weights  # noqa: E402
from pipeline.engine import Engine  # noqa: E402
from pipeline.model import build_model  # noqa: E402
from pipeline.objective import losses  # noqa: E402
from pipeline.recipe import OptimizerSection  # noqa: E402
from pipeline.startup import World, init_distributed, leave, set_environment  # noqa: E402
from tests.pipeline.test_objective import batch_of, small_config  # noqa: E402

STEPS = 3
DECAY = 0.75
SECTION = OptimizerSection(lr=1e-2, ema_decay=DECAY)


def make_engine(ds_config: dict[str, Any], world: World) -> Engine:
    completed = {
        **ds_config,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 3 * world.size,
        "gradient_clipping": 1.0,
        "steps_per_print": 1 << 62,
    }
    return Engine(build_model(small_config("gpt2"), "causal", 1), SECTION, completed, world, 0)


def step(engine: Engine, number: int) -> None:
    batch = batch_of("causal", seed=10 * number + engine.world.rank)
    engine.train_step(number, [batch], 1e-2)


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    """The whole float32 weights."""
    from deepspeed.utils import safe_get_full_fp32_param

    module, wrapped = engine.deepspeed.module, engine.deepspeed.optimizer
    parameters = dict(module.named_parameters())
    if hasattr(wrapped, "fp32_groups"):
        weights, kept = (itertools.chain.from_iterable(groups) for groups in (wrapped.fp16_groups, wrapped.fp32_groups))
        of_weight = {id(weight): master for weight, master in zip(weights, kept, strict=True)}
        return {name: of_weight[id(weight)].detach().clone() for name, weight in parameters.items()}
    if zero_stage(engine.deepspeed.config) == 0:
        return {name: weight.detach().clone() for name, weight in parameters.items()}
    return {name: safe_get_full_fp32_param(weight).clone() for name, weight in parameters.items()}


def computed_with(engine: Engine) -> dict[str, torch.Tensor]:
    """The whole weights as the model sees them."""
    import deepspeed

    parameters = dict(engine.deepspeed.module.named_parameters())
    sharded = zero_stage(engine.deepspeed.config) == 3
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=sharded):
        return {name: weight.detach().clone() for name, weight in parameters.items()}


def loss(engine: Engine) -> float:
    """The mean of a batch that all ranks see."""
    engine.deepspeed.eval()
    with torch.no_grad():
        found = losses(engine.head, batch_of("causal", seed=7), engine.dtype).of_tokens.mean()
    engine.deepspeed.train()
    return float(found)


def found_with(ds_config: dict[str, Any], world: World, folder: Path) -> dict[str, Any]:
    engine = make_engine(ds_config, world)
    by_hand: dict[str, torch.Tensor] = {}
    for number in range(STEPS):
        step(engine, number)
        for name, weight in masters(engine).items():
            by_hand[name] = DECAY * by_hand[name] + (1 - DECAY) * weight if number else weight
    engine.deepspeed.save_checkpoint(str(folder), tag="saved", save_latest=False)
    before = computed_with(engine), loss(engine)
    with engine.averaged_weights():
        inside = computed_with(engine), loss(engine)
    after = computed_with(engine), loss(engine)
    stage = zero_stage(ds_config)
    stored = ema_weights(folder / "saved", stage, build_model(small_config("gpt2"), "causal", 1), SECTION)
    resumed = make_engine(ds_config, world)
    resumed.deepspeed.load_checkpoint(str(folder), tag="saved")
    resumed.check_average()
    states, distributions = [], {}
    for one in (engine, resumed):
        earlier, own = masters(one), one.own_weights()
        step(one, STEPS)
        if one is engine:  # the other goes on without having looked
            for name, found in one.distributions(own):
                distributions[name] = (found.weights, found.norm, found.update_norm, earlier[name])
        states.append([torch.as_tensor(value) for state in one._optimizer.state.values() for value in state.values()])
    same = [torch.equal(left, right) for left, right in zip(*states, strict=True)]
    result = {
        "by_hand": by_hand, "before": before, "inside": inside, "after": after, "stored": stored,
        "resumed": all(same) and len(same) > 0, "last": (masters(engine), masters(resumed)),
        "distributions": distributions,
    }  # fmt: skip
    for one in (engine, resumed):
        one.deepspeed.destroy()
    return result


def main() -> None:
    folder, *paths = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("--")]
    set_environment()
    world = init_distributed()
    configs = {path.stem: json.loads(path.read_text()) for path in paths}
    needed = {name for config in configs.values() for name in ops.required_ops(config, "cpu")}
    ops.build_ops(sorted(needed), print)
    found = {}
    for name, config in configs.items():
        found[name] = found_with(config, world, folder / name)
        gc.collect()
    torch.save(found, f"{folder / 'found'}.{world.rank}")
    world.close()
    leave(0)


if __name__ == "__main__":
    main()
