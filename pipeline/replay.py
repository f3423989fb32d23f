"""Finds hardware that computes wrongly without a word (`--verify_every N`): each rank works its gradients of a step out
twice, and all ranks compare their weights.

Llama 3 (section 3.3.4) and Dixit et al. 2021 ("Silent Data Corruptions at Scale") describe what is looked for. Both
have to be equal bit by bit, so on GPUs only deterministic kernels will do.
"""

import socket
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from data_prep.errors import UserError
from pipeline.digests import digest, weights
from pipeline.engine import Engine
from pipeline.loader import DeviceBatch
from pipeline.startup import World

if TYPE_CHECKING:
    import torch


def check_possible(zero_stage: int, device_type: str, *, deterministic: bool) -> None:
    """Raises UserError where steps cannot be verified."""
    if zero_stage == 3:
        raise UserError(
            "--verify_every does not go with ZeRO stage 3, where no rank has the weights to repeat its work alone; take"
            " stage 0, 1 or 2, or leave it out"
        )
    if device_type != "cpu" and not deterministic:
        raise UserError("--verify_every needs --deterministic: other kernels' results vary without a fault")


def is_repeatable(compute: "Callable[[], Iterable[torch.Tensor]]") -> bool:
    """Whether two computations give the same bits."""
    return digest(compute()) == digest(compute())


def outliers(digests: Sequence[str]) -> list[int]:
    """Ranks whose digest is not that of most; all of them where no digest has a majority."""
    most, count = Counter(digests).most_common(1)[0]
    if count == len(digests):
        return []
    return [rank for rank, one in enumerate(digests) if one != most or 2 * count <= len(digests)]


def verify(engine: Engine, world: World, step: int, batches: Sequence[DeviceBatch]) -> None:
    """Verifies step `step`, from 0, before it is taken; called on every rank.

    Raises UserError on every rank, naming those that computed two different gradients, or hold other weights.
    """
    repeated = all(
        is_repeatable(lambda index=index, batch=batch: engine.local_gradients(step, index, batch))  # type: ignore[misc]
        for index, batch in enumerate(batches)
    )
    mine = repeated, digest(weights(engine.deepspeed)), socket.gethostname()
    gathered = world.gather(mine)
    unequal = [rank for rank, (same, _, _) in enumerate(gathered) if not same]
    odd = outliers([found for _, found, _ in gathered])
    named = ", ".join(f"rank {rank} on {gathered[rank][2]}" for rank in unequal or odd)
    advice = "the same command goes on from the newest checkpoint, without that machine"
    if unequal:
        raise UserError(
            f"{named} worked out two different gradients from the same samples and weights at step {step + 1}: its"
            f" processor or memory cannot be trusted; {advice}"
        )
    if odd:
        raise UserError(
            f"at step {step + 1} the ranks' weights differ, which are to be equal: {named}; processor or memory of one"
            f" cannot be trusted; {advice}"
        )
