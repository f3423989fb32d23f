"""A checkpoint of another world size, ZeRO stage or precision, carried over parameter by parameter.

DeepSpeed's files hold the float32 weights and the optimizer's states of a rank either as one tensor a parameter (stage
0) or as flat tensors in which stretches belong to parameters (stages 1 to 3). Which stretch of which tensor belongs to
which stretch of which parameter is what `pieces` says of either. Of the checkpoint's files it says where to read; of
what the new engine would save itself, where to write: only what two pieces share is copied, from files that are mapped,
so memory stays near one copy of a rank's own states. DeepSpeed then loads its own states as it loads any.

Each element stays bitwise what it was: every stage and precision here has float32 weights and states. The weights that
a bfloat16 model computes with are those rounded, as after any of DeepSpeed's steps.

DeepSpeed's universal checkpoints were the other candidate. Their converter reads unverified pickles, writes every
tensor to disk once more, knows stages 1 to 3 and Adam's two moments alone (zero/stage3.py names "exp_avg" and
"exp_avg_sq"), and needs --inject_missing_state for models that did not announce it.
"""

import math
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.checkpoint import CheckpointInfo
from pipeline.checkpointer import PARAMETER_NAMES, States, collect, read_state, restore
from pipeline.startup import World

_WEIGHT = "weight"  # the float32 weight among the names of a parameter's states
_OPTIMIZER = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_MODEL = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_00_model_states\.pt")


@dataclass(frozen=True)
class Piece:
    """A stretch of a parameter's float32 weight or of one of its optimizer states.

    start: of its first element in the flattened parameter. values: a view, flat.
    """

    parameter: str
    state: str
    start: int
    values: Tensor


@dataclass(frozen=True)
class Group:
    """Tensors of which an optimizer keeps states under one number.

    weight: of one parameter, or flat. members: (parameter, its first element here, elements here, its first element in
    the parameter). states: the optimizer's own dict of the group: tensors in the order of the weight, perhaps longer by
    padding, and other values.
    """

    weight: Tensor
    members: list[tuple[str, int, int, int]]
    states: dict[str, Any]

    def pieces(self) -> Iterator[Piece]:
        for state, tensor in {_WEIGHT: self.weight, **{k: v for k, v in self.states.items() if _is_long(v)}}.items():
            flat = tensor.detach().view(-1)
            for parameter, place, length, start in self.members:
                yield Piece(parameter, state, start, flat[place : place + length])


def _is_long(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _model(states: States) -> dict[str, Any]:
    (found,) = (state for name, state in states.items() if _MODEL.fullmatch(name))
    return dict(found)


def _optimizer(states: States) -> dict[str, Any] | None:
    found = [state for name, state in states.items() if _OPTIMIZER.fullmatch(name)]
    return found[0]["optimizer_state_dict"] if found else None


def groups_of(states: States, rank: int, world_size: int, before: Mapping[str, int]) -> list[Group]:
    """What a rank keeps of weights and optimizer states, in the numbering of its optimizer's states.

    states: of the rank's files. before: elements of parameters that the ranks before it keep (stages 1 and 2).
    """
    model, optimizer = _model(states), _optimizer(states)
    if optimizer is None:
        return _whole(model)
    if "fp32_flat_groups" in optimizer:
        kept = optimizer["optimizer_state_dict"]["state"]
        groups = []
        for index, (flat, shapes) in enumerate(zip(optimizer["fp32_flat_groups"], model["param_shapes"], strict=True)):
            members, place = [], 0
            for name, shape in shapes.items():
                share = math.ceil(shape.numel() / world_size)
                start = min(rank * share, shape.numel())
                members.append((name, place, min(share, shape.numel() - start), start))
                place += share
            groups.append(Group(flat, members, kept.setdefault(index, {})))
        return groups
    kept = optimizer["base_optimizer_state"]["state"]
    flats, stretches = optimizer["single_partition_of_fp32_groups"], optimizer["param_slice_mappings"]
    return [
        Group(
            flat,
            [(name, place.start, place.numel, before.get(name, 0)) for name, place in of_group.items()],
            kept.setdefault(index, {}),
        )
        for index, (flat, of_group) in enumerate(zip(flats, stretches, strict=True))
    ]


def _whole(model: dict[str, Any]) -> list[Group]:
    optimizer = model["optimizer"]
    in_half = "fp32_groups" in optimizer  # fp16 and bf16 have float32 weights beside the module's
    kept = (optimizer["optimizer_state_dict"] if in_half else optimizer)["state"]
    groups: list[Group] = []
    for group, names in enumerate(model[PARAMETER_NAMES]):
        for index, name in enumerate(names):
            weight = optimizer["fp32_groups"][group][index] if in_half else model["module"][name]
            groups.append(Group(weight, [(name, 0, weight.numel(), 0)], kept.setdefault(len(groups), {})))
    return groups


def _lengths(states: States) -> dict[str, int]:
    """Elements of each parameter that a rank keeps at stages 1 and 2."""
    of_groups = (_optimizer(states) or {}).get("param_slice_mappings", [])
    return {name: place.numel for of_group in of_groups for name, place in of_group.items()}


class Source:
    """The weights and states of a verified checkpoint, by parameter; the files are mapped, not read."""

    def __init__(self, folder: Path, info: CheckpointInfo) -> None:
        self._pieces: dict[str, dict[str, list[Piece]]] = defaultdict(lambda: defaultdict(list))
        self._scalars: dict[str, dict[str, Any]] = defaultdict(dict)
        before: Counter[str] = Counter()
        for rank in range(info.world_size if info.zero_stage else 1):
            models = (f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt")
            names = [name for name in models if name in info.files][:1]
            names += [name for name in info.files if (of := _OPTIMIZER.fullmatch(name)) and int(of[2]) == rank]
            states = {name: read_state(folder, name, info, mmap=True) for name in names}
            for group in groups_of(states, rank, info.world_size, before):
                for piece in group.pieces():
                    self._pieces[piece.parameter][piece.state].append(piece)
                for parameter, *_ in group.members:
                    self._scalars[parameter] |= {k: v for k, v in group.states.items() if not _is_long(v)}
            before.update(_lengths(states))
            if rank == 0:
                self.model = _model(states)
                self.optimizer = _optimizer(states)

    @property
    def parameters(self) -> set[str]:
        return set(self._pieces)

    def states(self, parameter: str) -> tuple[list[str], dict[str, Any]]:
        """The names of the optimizer's tensors of a parameter, and its other values, such as the step."""
        return [state for state in self._pieces[parameter] if state != _WEIGHT], self._scalars[parameter]

    def overlaps(self, target: Piece) -> Iterator[tuple[Tensor, Tensor]]:
        """What a piece shares with the checkpoint's: (its part, theirs)."""
        for piece in self._pieces[target.parameter][target.state]:
            first = max(piece.start, target.start)
            last = min(piece.start + piece.values.numel(), target.start + target.values.numel())
            if first < last:
                ours = target.values[first - target.start : last - target.start]
                yield ours, piece.values[first - piece.start : last - piece.start]

    def fill(self, target: Piece) -> None:
        copied = 0
        for ours, theirs in self.overlaps(target):
            ours.copy_(theirs)
            copied += ours.numel()
        if copied != target.values.numel():
            raise UserError(
                f"the checkpoint has {copied:,} of {target.values.numel():,} elements of {target.parameter}'s"
                f" {target.state}"
            )


def load(deepspeed: Any, folder: Path, info: CheckpointInfo, world: World) -> list[str]:
    """Puts DeepSpeed's engine into the state of a verified checkpoint of another layout; called on every rank.

    Returns the parameters that are not bitwise the checkpoint's afterwards: none. Raises UserError for one of another
    model, and for states on NVMe, which no checkpoint file holds.
    """
    if deepspeed.zero_nvme_offload_optimizer() or any(name.startswith("offloaded_tensors/") for name in info.files):
        raise UserError(
            f"{folder} was written by {info.layout}, and states on NVMe cannot be carried over: start it as it was"
        )
    source = Source(folder, info)
    states = _own_states(deepspeed, folder)
    before = Counter[str]()
    for lengths in world.gather(_lengths(states))[: world.rank]:
        before.update(lengths)
    groups = groups_of(states, world.rank, world.size, before)
    ours = {parameter for group in groups for parameter, *_ in group.members}
    names = set().union(*world.gather(ours))
    if names != source.parameters:
        different = sorted(names ^ source.parameters)
        raise UserError(f"{folder} is of a model with other parameters: {', '.join(different[:3])}")
    for group, like in zip(groups, _whole_groups(deepspeed, groups), strict=True):
        _fill(group, like, source, deepspeed)
    model = next(state for name, state in states.items() if _MODEL.fullmatch(name))
    for name, tensor in model["module"].items():
        if name in source.parameters and tensor.numel():  # stage 3 keeps no whole ones
            source.fill(Piece(name, _WEIGHT, 0, tensor.detach().view(-1)))
    for name in model["buffer_names"]:
        model["module"][name].copy_(source.model["module"][name])
    model.update({name: source.model[name] for name in ("global_steps", "global_samples", "skipped_steps")})
    with tempfile.TemporaryDirectory() as names_only:  # DeepSpeed looks whether they are there
        target = Path(names_only, folder.name)
        target.mkdir()
        for name in states:
            (target / name).touch()
        restore(deepspeed, target, states.__getitem__)
    for of_rates in deepspeed.optimizer.param_groups:
        of_rates["lr"] = info.learning_rate
    return _different(_own_states(deepspeed, folder), source, world, before)


def _own_states(deepspeed: Any, folder: Path) -> States:
    """What this rank would load: the model's file too, which rank 0 alone writes at stages 0 to 2."""
    writes, deepspeed.save_non_zero_checkpoint = deepspeed.save_non_zero_checkpoint, True
    try:
        return collect(deepspeed, folder)
    finally:
        deepspeed.save_non_zero_checkpoint = writes


def _whole_groups(deepspeed: Any, groups: list[Group]) -> list[Tensor]:
    """Tensors as long as each group's states are: at stages 1 and 2 DeepSpeed saves weights without their padding."""
    padded = getattr(deepspeed.optimizer, "single_partition_of_fp32_groups", None)
    return padded if padded is not None else [group.weight for group in groups]


def _fill(group: Group, like: Tensor, source: Source, deepspeed: Any) -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    group.states.clear()
    for parameter, _, length, _ in group.members:
        tensors, others = source.states(parameter)
        for state in tensors if length else ():
            if state not in group.states:
                group.states[state] = torch.zeros_like(like)
        for state, value in others.items():
            if isinstance(deepspeed.basic_optimizer, DeepSpeedCPUAdam):
                group.states[state] = int(value)  # torch's AdamW keeps its step as a tensor
            elif isinstance(value, Tensor) or isinstance(deepspeed.basic_optimizer, torch.optim.AdamW):
                group.states[state] = torch.tensor(float(value))
            else:
                group.states[state] = value
    for piece in group.pieces():
        if piece.values.numel():
            source.fill(piece)


def _different(states: States, source: Source, world: World, before: Mapping[str, int]) -> list[str]:
    different = {
        piece.parameter
        for group in groups_of(states, world.rank, world.size, before)
        for piece in group.pieces()
        for ours, theirs in source.overlaps(piece)
        if not torch.equal(ours.cpu(), theirs)
    }
    return sorted(different)
