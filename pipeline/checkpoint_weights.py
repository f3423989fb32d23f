"""A checkpoint's weights by name, without its optimizer states, and nothing else of its pickles.

ZeRO 0 to 2 keep whole weights in the training precision, which stay in the mapped file until they are used. ZeRO 3
keeps each rank's part of each parameter in float32 (DeepSpeed 0.19.8, utils/zero_to_fp32.py, has the layout); they are
put together one by one, in the precision asked for: one copy of the model in all.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError

if TYPE_CHECKING:
    import torch

_MODEL_STATES = "mp_rank_00_model_states.pt"
_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


def read_weights(folder: Path, zero_stage: int, dtype: "torch.dtype") -> "dict[str, torch.Tensor]":
    """The whole weights of a verified checkpoint folder, tied ones as one tensor; numbers that are no integers in
    `dtype`. Raises UserError when the files are not laid out as DeepSpeed's are."""
    if zero_stage < 3:
        found = load_file(folder / _MODEL_STATES)["module"]
        weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in found.items()}
        return _tied_again(found, weights)
    return _gathered(folder, dtype)


def _tied_again(found: "dict[str, torch.Tensor]", weights: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """Weights that were views of the same numbers before `found` was converted are one tensor again."""
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in found.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel():
            weights[name] = weights[first.setdefault(place, name)]
    return weights


def _gathered(folder: Path, dtype: "torch.dtype") -> "dict[str, torch.Tensor]":
    import torch

    states = load_file(folder / f"zero_pp_rank_0_{_MODEL_STATES}")
    ranks = {int(match[1]): path for path in folder.iterdir() if (match := _RANK.search(path.name))}
    if sorted(ranks) != list(range(len(ranks))) or not ranks:
        raise UserError(f"{folder} has optimizer states of ranks {sorted(ranks)}, expected them from rank 0 on")
    parts = [load_file(ranks[rank])["optimizer_state_dict"]["fp32_flat_groups"] for rank in range(len(ranks))]
    weights = {name: states["module"][name].clone() for name in states["buffer_names"]}
    offset = 0
    for shapes in states["param_shapes"]:
        for name, shape in shapes.items():
            # Each rank has an equal part of each parameter, the last one's filled up.
            part = -(-shape.numel() // len(parts))
            weight = torch.empty(shape, dtype=dtype)
            flat = weight.view(-1)
            for rank, groups in enumerate(parts):
                begin = rank * part
                _copy(groups, offset, flat[begin : min(begin + part, flat.numel())])
            weights[name] = weight
            offset += part
    if any(offset != sum(group.numel() for group in groups) for groups in parts):
        raise UserError(f"{folder}: the ranks' parts do not add up to the parameters that it names")
    for name, same in states["shared_params"].items():
        weights[name] = weights[same]
    if missing := set(states["module"]) - set(weights):
        raise UserError(
            f"{folder} has no values of {', '.join(sorted(missing))} (frozen parameters are not known here)"
        )
    return {name: weights[name] for name in states["module"]}


def _copy(groups: "list[torch.Tensor]", begin: int, target: "torch.Tensor") -> None:
    """Copies from flat groups that lie behind one another, from number `begin` of them on."""
    done = 0
    for group in groups:
        if done < target.numel() and begin < group.numel():
            size = min(group.numel() - begin, target.numel() - done)
            target[done : done + size].copy_(group[begin : begin + size])
            done, begin = done + size, 0
        elif done < target.numel():
            begin -= group.numel()


def load_file(path: Path) -> dict[str, Any]:
    """What a file of DeepSpeed's holds, its tensors mapped. Objects of classes that are none of torch's (DeepSpeed's
    loss scaler, enumerations, addresses of fragments) keep their attributes and lose their class: no code that a file
    names is run."""
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    classes = [(type("Attributes", (_Attributes,), {}), name) for name in get_unsafe_globals_in_checkpoint(path)]
    with safe_globals(classes):
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return found


class _Attributes:
    def __new__(cls, *_: Any) -> "_Attributes":
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass
