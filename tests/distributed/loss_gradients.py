"""Run by the launcher: losses of models under ZeRO-3, and their whole gradients; each rank saves what it has."""

import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

from pipeline.heads import LossHead  # noqa: E402
from pipeline.loader import DeviceBatch  # noqa: E402
from pipeline.model import build_model  # noqa: E402
from pipeline.objective import losses  # noqa: E402
from pipeline.startup import World, init_distributed, leave, set_environment  # noqa: E402


def gradients(case: dict[str, Any], world: World) -> dict[str, Any]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = build_model(case["config"], case["objective"], 1, pairs=case["pairs"])
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": case["bf16"]},
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.0),
        config=ds_config,
        dist_init_required=False,
    )
    batch: DeviceBatch = case["batches"][world.rank]
    dtype = torch.bfloat16 if case["bf16"] else torch.float32
    head = LossHead(engine, world.device, z_loss=case["z_loss"])
    with torch.no_grad():
        evaluated = losses(head, batch, dtype).of_tokens
    for _ in range(2):  # the second time by the order of modules that DeepSpeed recorded the first time
        found = losses(head, batch, dtype, scale=world.size / case["targets"])
        loss = found.trained if found.of_pairs is None else found.trained + found.of_pairs.sum()
        engine.backward(loss, scale_wrt_gas=False)
        whole = {name: safe_get_full_grad(parameter) for name, parameter in model.named_parameters()}
        engine.step()
    return {
        "of_tokens": found.of_tokens,
        "evaluated": evaluated,
        "gradients": whole,
        "head": (head.selects, head.fuses),
    }


def main() -> None:
    cases, output = sys.argv[-2:]
    set_environment()
    world = init_distributed()
    found = [gradients(case, world) for case in torch.load(cases, weights_only=False)]
    torch.save(found, f"{output}.{world.rank}")
    world.close()
    leave(0)


if __name__ == "__main__":
    main()
