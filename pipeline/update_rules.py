"""Update rules that torch and DeepSpeed do not have for every device and ZeRO stage: Lion, LAMB, Muon.

They need no compiler: DeepSpeed's FusedLion and FusedLamb are CUDA extensions, and its Muon goes through torch.compile.
This module imports torch as it is imported; `pipeline.optimizer` imports it where it is needed.
"""

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, distributed
from torch.optim import AdamW, Optimizer

Groups = list[dict[str, Any]]


def _with_gradients(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[Tensor], list[Tensor]]]:
    """(group, its parameters that have a gradient, those gradients), without groups that have none."""
    for group in groups:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if parameters:
            yield group, parameters, [parameter.grad for parameter in parameters]


def _state(optimizer: Optimizer, name: str, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The tensors `name` that belong to the parameters, zeros at first."""
    for parameter in parameters:
        if name not in optimizer.state[parameter]:
            optimizer.state[parameter][name] = torch.zeros_like(parameter)
    return [optimizer.state[parameter][name] for parameter in parameters]


class Lion(Optimizer):
    """Lion (Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, algorithm 2): one moment a weight.

    Each weight moves by the learning rate in the direction of a sign: rates are 3 to 10 times below AdamW's, decays as
    much above (section 5). Elementwise, so it may see slices of weights.
    """

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: None = None) -> None:
        for group, parameters, gradients in _with_gradients(self.param_groups):
            moments = _state(self, "exp_avg", parameters)
            lr, (beta1, beta2) = group["lr"], group["betas"]
            directions = torch._foreach_lerp(moments, gradients, 1 - beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-lr)
            torch._foreach_lerp_(moments, gradients, 1 - beta2)


class Lamb(Optimizer):
    """LAMB (You et al. 2020, Large Batch Optimization for Deep Learning, algorithm 2), phi the identity.

    Adam's direction with its decay, scaled to the norm of the weight that it changes. As in the authors' training of
    BERT, biases and norms are not scaled (`adapts` is False in their group). The norms are those of whole tensors:
    the slices that ZeRO keeps at stages 1 to 3 would each be scaled to a norm of their own.
    """

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "adapts": True})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: None = None) -> None:
        for group, parameters, gradients in _with_gradients(self.param_groups):
            first, second = (_state(self, name, parameters) for name in ("exp_avg", "exp_avg_sq"))
            for parameter in parameters:
                self.state[parameter]["step"] = self.state[parameter].get("step", 0) + 1
            beta1, beta2 = group["betas"]
            steps = [self.state[parameter]["step"] for parameter in parameters]
            torch._foreach_lerp_(first, gradients, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
            directions = torch._foreach_div(second, [1 - beta2**step for step in steps])
            torch._foreach_sqrt_(directions)
            torch._foreach_add_(directions, group["eps"])
            torch._foreach_reciprocal_(directions)
            torch._foreach_mul_(directions, first)
            torch._foreach_div_(directions, [1 - beta1**step for step in steps])
            torch._foreach_add_(directions, parameters, alpha=group["weight_decay"])
            if group["adapts"]:
                norms = zip(torch._foreach_norm(parameters), torch._foreach_norm(directions), strict=True)
                # A weight of zeros has to be able to leave them.
                torch._foreach_mul_(
                    directions,
                    [torch.where((weight > 0) & (change > 0), weight / change, 1.0) for weight, change in norms],
                )
            torch._foreach_add_(parameters, directions, alpha=-group["lr"])


Kept = Literal["whole", "joined", "each"]
"""How an optimizer sees matrices: whole (ZeRO stage 0), as this rank's slice of their concatenation (stages 1 and 2),
or as the concatenation of this rank's slice of each (stage 3)."""


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of the one group with `orthogonal` True, AdamW for the other groups.

    A matrix moves along the nearest orthogonal matrix of its momentum, times 0.2 sqrt(max(rows, columns)): that has
    the root mean square of AdamW's usual updates, so both take the same learning rate and decay (Moonlight: Liu et al.
    2025, Muon is Scalable for LLM Training, section 2.2).

    Where ZeRO keeps slices, the matrices are dealt out over the ranks (`Deal`). Gradients arrive reduced and clipped,
    so a step is the same at every stage; DeepSpeed's own Muon clips at stages 2 and 3 what is orthogonal already.
    """

    def __init__(
        self, groups: Groups, lr: float, betas: tuple[float, float], eps: float, momentum: float, kept: Kept
    ) -> None:
        (of_matrices,) = (group for group in groups if group["orthogonal"])
        self._shapes = [tuple(matrix.shape) for matrix in of_matrices["params"]]
        self._kept: Kept = kept
        self._deals: dict[Tensor, Deal] = {}
        others = [group for group in groups if not group["orthogonal"]]
        self._adamw = AdamW(others, lr=lr, betas=betas, eps=eps, fused=True)
        super().__init__(groups, {**self._adamw.defaults, "momentum": momentum})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: None = None) -> None:
        of_matrices = (group for group in self.param_groups if group["orthogonal"])
        for group, parameters, gradients in _with_gradients(of_matrices):
            lr, momentum = group["lr"], group["momentum"]
            moments = _state(self, "momentum_buffer", parameters)
            torch._foreach_lerp_(moments, gradients, 1 - momentum)
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
            for parameter, gradient, moment in zip(parameters, gradients, moments, strict=True):
                ahead = gradient.lerp(moment, momentum).bfloat16()  # Nesterov's
                if self._kept == "whole":
                    parameter.add_(orthogonal(ahead), alpha=-lr * _scale(ahead.shape))
                    continue
                deal = self._deal(parameter)
                for shape, place, direction in deal.exchange(ahead):
                    parameter[place].add_(direction, alpha=-lr * _scale(shape))
        # DeepSpeed steps one group at a time, and loading a checkpoint replaces groups and state.
        self._adamw.param_groups = [group for group in self.param_groups if not group["orthogonal"]]
        self._adamw.state = self.state
        self._adamw.step()

    def _deal(self, flat: Tensor) -> "Deal":
        """The deal of the matrices in `flat`: the next that are in none. (Stage 3 may step a group in several parts,
        the first matrices first.)"""
        if flat not in self._deals:
            rest = self._shapes[sum(len(deal.shapes) for deal in self._deals.values()) :]
            world, rank = distributed.get_world_size(), distributed.get_rank()
            self._deals[flat] = Deal(rest, flat.numel(), self._kept, world, rank)
        return self._deals[flat]


def _scale(shape: Sequence[int]) -> float:
    return 0.2 * math.sqrt(max(shape))


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly the orthogonal matrix that is nearest to a bf16 [rows, columns]: singular values come to 0.7 to 1.2 unless
    they are tiny beside the others.

    Five Newton-Schulz iterations with the coefficients of Jordan et al. 2024, in bf16.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x


class Deal:
    """Which rank finds the directions of which matrices, and which slices travel for that.

    shapes: of matrices [rows, columns], of which those that fill the slices are taken. numel: of what a rank keeps,
    padding included. kept: "joined" or "each".
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], numel: int, kept: Kept, world: int, rank: int) -> None:
        sizes = np.array([math.prod(shape) for shape in shapes])
        ranks = np.arange(world)[:, None]
        if kept == "joined":
            begins = np.cumsum(sizes) - sizes
            starts = np.clip(ranks * numel - begins, 0, sizes)
            stops = np.clip((ranks + 1) * numel - begins, 0, sizes)
            places = np.maximum(0, begins - rank * numel)
        else:
            shares = -(-sizes // world)
            ends = np.cumsum(shares)
            taken = int(np.searchsorted(ends, numel)) + 1
            sizes, shares, ends = sizes[:taken], shares[:taken], ends[:taken]
            starts, stops = np.minimum(ranks * shares, sizes), np.minimum((ranks + 1) * shares, sizes)
            places = ends - shares
        self.shapes = list(shapes[: len(sizes)])
        self._owners = np.array(_owners(self.shapes, world))
        self._order = np.argsort(self._owners, kind="stable")
        self._own = self._order[self._owners[self._order] == rank]
        self._starts, self._stops = starts, stops
        lengths = stops - starts
        self._places = [slice(place, place + length) for place, length in zip(places, lengths[rank], strict=True)]
        self._sent = [int(lengths[rank, self._owners == owner].sum()) for owner in range(world)]
        self._received = lengths[:, self._own].sum(axis=1).tolist()
        self._pieces = lengths[:, self._own].flatten().tolist()

    def exchange(self, flat: Tensor) -> Iterator[tuple[tuple[int, ...], slice, Tensor]]:
        """(shape of a matrix, place of this rank's slice of it, direction there) of each matrix, in the deal's order.

        flat: what this rank keeps of the momenta, bf16. Called on every rank.
        """
        there = torch.cat([flat[self._places[matrix]] for matrix in self._order])
        here = flat.new_empty(sum(self._received))
        distributed.all_to_all_single(here, there, self._received, self._sent)
        pieces = here.split(self._pieces)
        directions = [
            orthogonal(torch.cat(pieces[index :: len(self._own)]).view(self.shapes[matrix])).flatten()
            for index, matrix in enumerate(self._own)
        ]
        if directions:
            slices = zip(self._starts[:, self._own], self._stops[:, self._own], strict=True)
            here = torch.cat(
                [
                    direction[start:stop]
                    for starts, stops in slices
                    for direction, start, stop in zip(directions, starts, stops, strict=True)
                ]
            )
        distributed.all_to_all_single(there, here, self._sent, self._received)
        lengths = [self._places[matrix].stop - self._places[matrix].start for matrix in self._order]
        for matrix, direction in zip(self._order, there.split(lengths), strict=True):
            yield self.shapes[matrix], self._places[matrix], direction


def _owners(shapes: Sequence[tuple[int, ...]], world: int) -> list[int]:
    """A rank for each matrix, the costliest dealt first, each to the rank with the least to do so far."""
    costs = [math.prod(shape) * min(shape) for shape in shapes]
    loads = [(0, rank) for rank in range(world)]
    owners = [0] * len(shapes)
    for matrix in sorted(range(len(shapes)), key=lambda matrix: -costs[matrix]):
        load, owners[matrix] = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[matrix], owners[matrix]))
    return owners
