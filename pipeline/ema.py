"""An exponential moving average of the weights (Polyak & Juditsky 1992; `optimizer.ema_decay`).

It is one more float32 state of the optimizer for each tensor that the optimizer updates: the whole weights at ZeRO
stage 0, a rank's flat share of the master weights above. So it is sharded, saved and restored as the moments are,
without DeepSpeed knowing of it. As torch.optim.swa_utils.AveragedModel does, it begins with the weights after the first
step: average = decay x average + (1 - decay) x weights, once after every step that the optimizer takes.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError
from pipeline.checkpoint_weights import load_file

if TYPE_CHECKING:
    import torch

    from pipeline.recipe import OptimizerSection

_STATE = "ema"
_EXCHANGED = 1 << 24  # elements that are copied aside at a time


def keep_average(optimizer: "torch.optim.Optimizer", decay: float) -> None:
    """Has the optimizer, which DeepSpeed's wraps, keep the average of what it updates; before its first step."""
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    update = get_ema_multi_avg_fn(decay)

    def after_step(optimizer: "torch.optim.Optimizer", *_: Any) -> None:
        averages, weights = [], []
        for group in optimizer.param_groups:  # DeepSpeed steps one group, or one part of it, at a time
            for weight in group["params"]:
                state = optimizer.state.get(weight)
                if not state:
                    continue  # never updated: a state of ours alone would look like an initialised one
                if _STATE in state:
                    averages.append(state[_STATE])
                    weights.append(weight.detach())
                else:
                    state[_STATE] = weight.detach().clone()
        if weights:
            update(averages, weights, None)

    optimizer.register_step_post_hook(after_step)


def check_average(optimizer: "torch.optim.Optimizer") -> None:
    """Raises UserError when the states that a checkpoint restored are without the average."""
    if not any(_STATE in state for state in optimizer.state.values()):
        raise UserError(
            "optimizer.ema_decay: the checkpoint holds no average of the weights to go on with; set it to null, or give"
            " another --output_dir"
        )


@contextlib.contextmanager
def averaged(engine: Any, optimizer: "torch.optim.Optimizer") -> Iterator[None]:
    """While open, DeepSpeed's engine computes with the average; afterwards with the weights of before, bit by bit.

    Called on every rank, between two steps. The two exchange places, so that no third copy is needed.
    """
    _exchange(optimizer)
    try:
        _refresh(engine)
        yield
    finally:
        _exchange(optimizer)
    _refresh(engine)


def _exchange(optimizer: "torch.optim.Optimizer") -> None:
    for weight, state in optimizer.state.items():
        if _STATE in state:
            exchange(weight.data, state[_STATE])


def exchange(one: "torch.Tensor", other: "torch.Tensor") -> None:
    """Has two contiguous tensors change contents, with little memory beside them; what shares theirs sees it."""
    parts = (tensor.view(-1).split(_EXCHANGED) for tensor in (one, other))
    for left, right in zip(*parts, strict=True):
        kept = left.clone()
        left.copy_(right)
        right.copy_(kept)


def _refresh(engine: Any) -> None:
    """Brings what the model computes with up to the master weights, as DeepSpeed (0.19.8) does at the end of a step."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):  # stages 1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp16_partitioned_groups_flat"):  # stage 3
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer.checkpoint_event_epilogue()  # gathers what is always whole, drops hpZ's copies
    elif hasattr(optimizer, "fp32_groups"):  # stage 0 in 16 bits
        for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                weight.data.copy_(master.data)


def ema_weights(
    folder: Path, zero_stage: int, model: "torch.nn.Module", optimizer: "OptimizerSection"
) -> dict[str, "torch.Tensor"]:
    """The whole averages by name, float32, from a verified checkpoint folder; without parameters that were never
    updated.

    model: the run's, padded or not, on any device, of which names, ties and order are used. Raises UserError when the
    run kept no average.
    """
    found = _read(folder, zero_stage, model, optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = {name: names[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    found |= {name: found[tied] for name, tied in every.items() if tied in found}
    return found


def _read(
    folder: Path, zero_stage: int, model: "torch.nn.Module", optimizer: "OptimizerSection"
) -> dict[str, "torch.Tensor"]:
    """The averages as DeepSpeed's files have them; of tied weights one name alone."""
    import torch

    models = sorted(folder.glob("*model_states.pt"))
    if zero_stage == 0:
        from pipeline.optimizer import optimizer_groups

        names = {id(parameter): name for name, parameter in model.named_parameters()}
        ordered = [names[id(one)] for group in optimizer_groups(model, optimizer) for one in group["params"]]
        stored = load_file(models[0])["optimizer"]
        states = _averages(stored.get("optimizer_state_dict", stored), folder)
        return {ordered[index]: average for index, average in states.items()}
    ranks = [load_file(path)["optimizer_state_dict"] for path in sorted(folder.glob("*optim_states.pt"), key=_rank)]
    if zero_stage == 3:
        flat = [torch.cat(list(_averages(rank["optimizer_state_dict"], folder).values())) for rank in ranks]
        shapes = {name: shape for group in load_file(models[0])["param_shapes"] for name, shape in group.items()}
        return _joined(flat, shapes)
    found: dict[str, list[torch.Tensor]] = {}
    for rank in ranks:
        averages = _averages(rank["base_optimizer_state"], folder)
        for index, slices in enumerate(rank["param_slice_mappings"]):
            for name, place in slices.items():
                found.setdefault(name, []).append(averages[index].narrow(0, place.start, place.numel))
    shapes = {name: shape for group in load_file(models[0])["param_shapes"] for name, shape in group.items()}
    return {name: torch.cat(parts).view(shapes[name]) for name, parts in found.items()}


def _rank(path: Path) -> int:
    """As in `bf16_zero_pp_rank_10_mp_rank_00_optim_states.pt`."""
    return int(path.name.split("pp_rank_")[1].split("_")[0])


def _averages(stored: Mapping[str, Any], folder: Path) -> dict[int, "torch.Tensor"]:
    """By index, in the order of the optimizer's tensors."""
    states = stored["state"]
    if not states or not all(_STATE in state for state in states.values()):
        raise UserError(f"{folder} holds no average of the weights; train with optimizer.ema_decay")
    return {index: states[index][_STATE] for index in sorted(states)}


def _joined(flat: Sequence["torch.Tensor"], shapes: Mapping[str, Sequence[int]]) -> dict[str, "torch.Tensor"]:
    """Stage 3's weights from the ranks' shares: each weight is cut into equal parts, one a rank, the last filled up."""
    import torch

    found, start = {}, 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        size = -(-numel // len(flat))
        parts = torch.cat([share.narrow(0, start, size) for share in flat])
        found[name] = parts[:numel].view(*shape)
        start += size
    return found
