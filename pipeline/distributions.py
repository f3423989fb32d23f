"""How the weights are distributed, and how far a step moved them, parameter by parameter (on request: it costs a copy
of a rank's own float32 weights, and at ZeRO 1 to 3 gathers every parameter twice)."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.ds_config import zero_stage
from pipeline.ema import exchange

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Distribution:
    """Of one parameter after a step. weights: float32, whole. norm: of them. update_norm: of the step's change."""

    weights: "torch.Tensor"
    norm: float
    update_norm: float


def own_weights(deepspeed: Any, optimizer: "torch.optim.Optimizer") -> "list[torch.Tensor]":
    """A rank's float32 weights as the optimizer updates them: whole at stage 0, its flat shares above."""
    flat = getattr(deepspeed.optimizer, "fp32_partitioned_groups_flat", None)  # stage 3 empties the groups
    return list(flat) if flat is not None else [one for group in optimizer.param_groups for one in group["params"]]


def distributions(
    deepspeed: Any, optimizer: "torch.optim.Optimizer", before: "Sequence[torch.Tensor]"
) -> Iterator[tuple[str, Distribution]]:
    """Of every parameter, by name; called and used up on every rank.

    before: copies of `own_weights` from before the step, which are overwritten.
    """
    own = [weight.data for weight in own_weights(deepspeed, optimizer)]
    for earlier, weight in zip(before, own, strict=True):
        earlier.sub_(weight)
    # For a moment the differences stand where DeepSpeed gathers weights from.
    for earlier, weight in zip(before, own, strict=True):
        exchange(earlier, weight)
    try:
        moved = {name: float(update.norm()) for name, update in _whole(deepspeed)}
    finally:
        for earlier, weight in zip(before, own, strict=True):
            exchange(earlier, weight)
    for name, weight in _whole(deepspeed):
        yield name, Distribution(weight, float(weight.norm()), moved[name])


def _whole(deepspeed: Any) -> "Iterator[tuple[str, torch.Tensor]]":
    """The whole float32 weights by name."""
    from deepspeed.utils import safe_get_full_fp32_param

    wrapped = deepspeed.optimizer
    if hasattr(wrapped, "fp32_groups"):  # stage 0 in 16 bits
        weights, masters = map(itertools.chain.from_iterable, (wrapped.fp16_groups, wrapped.fp32_groups))
        kept = {id(weight): master for weight, master in zip(weights, masters, strict=True)}
    else:
        kept = {} if zero_stage(deepspeed.config) else {id(one): one for one in deepspeed.module.parameters()}
    for name, parameter in deepspeed.module.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = kept[id(parameter)] if kept else safe_get_full_fp32_param(parameter)
        yield name, whole.detach()
