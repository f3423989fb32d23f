"""The batch triangle: global batch = micro-batch x gradient accumulation x world, worked out here and only here."""

import math
from dataclasses import dataclass
from typing import Any

from data_prep.errors import UserError

# Tokens of a micro-batch that "auto" aims at: enough rows to fill the matrix units, few enough for the logits.
AUTO_TOKENS = {"cpu": 4_096, "cuda": 16_384}


@dataclass(frozen=True)
class BatchPlan:
    """Sizes in samples; `gradient_accumulation_steps` micro-batches a rank make one optimizer step."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch_size} = micro-batch {self.micro_batch_size}"
            f" x accumulation {self.gradient_accumulation_steps} x {self.world_size} ranks"
        )

    def of_size(self, global_batch_size: int) -> "BatchPlan":
        """The triangle of another step of a ramp: the same micro-batch, more or less accumulation."""
        accumulation = global_batch_size // (self.micro_batch_size * self.world_size)
        return BatchPlan(global_batch_size, self.micro_batch_size, accumulation, self.world_size)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def plan_batches(
    ds_config: dict[str, Any],
    *,
    source: str,
    global_batch_size: int,
    world_size: int,
    sequence_length: int,
    device: str,
    later_sizes: tuple[int, ...] = (),
    setting: str = "training.global_batch_size",
) -> BatchPlan:
    """Works the triangle out from the recipe's global batch and the ds_config's micro-batch.

    later_sizes: global batches that a ramp comes to; the micro-batch fits them all. setting: what messages call the
    global batch.

    A micro-batch of "auto" (or none) becomes the largest that divides a rank's share of the global batch and has
    at most AUTO_TOKENS tokens. device: "cpu", "cuda", ...

    Raises UserError when the numbers do not divide or the ds_config states an accumulation that does not follow.
    """
    for size in (global_batch_size, *later_sizes):
        if size % world_size:
            fitting = max(divisor for divisor in _divisors(size) if divisor <= world_size)
            raise UserError(
                f"{setting} is {size}, not a multiple of the {world_size} ranks; start"
                f" {fitting} ranks, or take {-(-size // world_size) * world_size} samples"
            )
    # What each rank has of every global batch of a ramp, as far as it is common to all.
    share = math.gcd(*(size // world_size for size in (global_batch_size, *later_sizes)))
    micro = ds_config.get("train_micro_batch_size_per_gpu", "auto")
    stated = ds_config.get("gradient_accumulation_steps")
    if stated is not None and later_sizes:
        raise UserError(
            f"{source}: gradient_accumulation_steps is {stated}, but training.global_batch_size is a ramp, whose"
            " accumulation follows it; leave the key out"
        )
    if stated is not None and not _is_count(stated):
        raise UserError(
            f"{source}: gradient_accumulation_steps is {stated!r}, expected a positive number; leave the key out to"
            " have it worked out"
        )
    if micro == "auto" and stated is not None:
        if share % stated:
            raise UserError(
                f"{source}: gradient_accumulation_steps is {stated}, which does not divide the {share} samples that"
                f" each of {world_size} ranks has of {setting} {global_batch_size}"
            )
        micro = share // stated
    if micro == "auto":
        limit = max(1, AUTO_TOKENS.get(device, AUTO_TOKENS["cuda"]) // sequence_length)
        micro = max(divisor for divisor in _divisors(share) if divisor <= limit)
    if not _is_count(micro):
        raise UserError(f'{source}: train_micro_batch_size_per_gpu is {micro!r}, expected a positive number or "auto"')
    if share % micro:
        nearest = min(_divisors(share), key=lambda divisor: abs(divisor - micro))
        raise UserError(
            f"{source}: train_micro_batch_size_per_gpu is {micro}, which does not divide the {share} samples that each"
            f" of {world_size} ranks has of {setting} {global_batch_size}; {nearest} would"
        )
    accumulation = global_batch_size // world_size // micro
    if stated is not None and stated != accumulation:
        raise UserError(
            f"{source}: gradient_accumulation_steps is {stated}, but {setting} {global_batch_size}"
            f" / (micro-batch {micro} x {world_size} ranks) is {accumulation}; leave the key out"
        )
    return BatchPlan(global_batch_size, micro, accumulation, world_size)
