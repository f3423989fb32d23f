"""The batch triangle: micro-batch x gradient accumulation x world is the global batch, or one line says why not."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipeline.batch import AUTO_TOKENS, BatchPlan, plan_batches

SIZES = st.integers(1, 96)
SEQUENCE_LENGTHS = st.sampled_from([16, 128, 512, 1024, 2048, 32_768])
DEVICES = st.sampled_from(["cpu", "cuda", "xpu"])


def plan(
    ds_config: dict[str, Any],
    global_batch_size: int,
    world_size: int,
    sequence_length: int = 128,
    device: str = "cuda",
) -> BatchPlan:
    return plan_batches(
        ds_config,
        source="x.json",
        global_batch_size=global_batch_size,
        world_size=world_size,
        sequence_length=sequence_length,
        device=device,
    )


def fault_of(ds_config: dict[str, Any], global_batch_size: int, world_size: int) -> str:
    with pytest.raises(UserError) as caught:
        plan(ds_config, global_batch_size, world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


@given(micro=SIZES, accumulation=SIZES, world=SIZES)
def test_a_stated_micro_batch_that_divides_is_kept(micro: int, accumulation: int, world: int) -> None:
    found = plan({"train_micro_batch_size_per_gpu": micro}, micro * accumulation * world, world)
    assert found == BatchPlan(micro * accumulation * world, micro, accumulation, world)


@given(micro=SIZES, accumulation=SIZES, world=SIZES, stated_micro=st.booleans())
def test_a_stated_accumulation_that_divides_is_kept(
    micro: int, accumulation: int, world: int, stated_micro: bool
) -> None:
    ds_config = {
        "train_micro_batch_size_per_gpu": micro if stated_micro else "auto",
        "gradient_accumulation_steps": accumulation,
    }
    found = plan(ds_config, micro * accumulation * world, world)
    assert (found.micro_batch_size, found.gradient_accumulation_steps) == (micro, accumulation)


@given(
    share=st.integers(1, 4096),
    world=SIZES,
    sequence_length=SEQUENCE_LENGTHS,
    device=DEVICES,
    ds_config=st.sampled_from([{}, {"train_micro_batch_size_per_gpu": "auto"}]),
)
def test_auto_is_the_largest_micro_batch_that_divides_within_the_limit(
    share: int, world: int, sequence_length: int, device: str, ds_config: dict[str, Any]
) -> None:
    found = plan(ds_config, share * world, world, sequence_length, device)
    micro = found.micro_batch_size
    assert micro * found.gradient_accumulation_steps * world == share * world
    limit = AUTO_TOKENS["cpu"] if device == "cpu" else AUTO_TOKENS["cuda"]
    assert micro == 1 or micro * sequence_length <= limit
    larger = range(micro + 1, min(share, limit // sequence_length) + 1)
    assert not any(share % size == 0 for size in larger)


@given(global_batch_size=st.integers(1, 2000), world=SIZES, micro=st.integers(1, 64), accumulation=st.integers(1, 64))
def test_whatever_is_stated_the_triangle_closes_or_the_run_is_refused(
    global_batch_size: int, world: int, micro: int, accumulation: int
) -> None:
    stated = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    closes = micro * accumulation * world == global_batch_size
    try:
        found = plan(stated, global_batch_size, world)
    except UserError:
        assert not closes
    else:
        assert closes
        assert found == BatchPlan(global_batch_size, micro, accumulation, world)


def test_ranks_that_do_not_divide_the_global_batch_name_both_ways_out() -> None:
    assert fault_of({}, 100, 8) == (
        "training.global_batch_size is 100, not a multiple of the 8 ranks; start 5 ranks, or take 104 samples"
    )


def test_more_ranks_than_samples_is_refused() -> None:
    assert fault_of({}, 2, 8) == (
        "training.global_batch_size is 2, not a multiple of the 8 ranks; start 2 ranks, or take 8 samples"
    )


@given(global_batch_size=st.integers(1, 500), world=st.integers(2, 64))
def test_the_ranks_and_samples_that_are_proposed_work(global_batch_size: int, world: int) -> None:
    if global_batch_size % world == 0:
        return
    words = fault_of({}, global_batch_size, world).replace(",", "").split()
    plan({}, global_batch_size, int(words[words.index("start") + 1]))
    plan({}, int(words[words.index("take") + 1]), world)


def test_a_micro_batch_that_does_not_divide_names_the_nearest_that_does() -> None:
    assert fault_of({"train_micro_batch_size_per_gpu": 7}, 32, 4) == (
        "x.json: train_micro_batch_size_per_gpu is 7, which does not divide the 8 samples that each of 4 ranks has of"
        " training.global_batch_size 32; 8 would"
    )


def test_an_accumulation_that_does_not_divide_is_refused() -> None:
    assert fault_of({"gradient_accumulation_steps": 3}, 32, 4) == (
        "x.json: gradient_accumulation_steps is 3, which does not divide the 8 samples that each of 4 ranks has of"
        " training.global_batch_size 32"
    )


def test_an_accumulation_that_does_not_follow_from_the_micro_batch_is_refused() -> None:
    stated = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    assert fault_of(stated, 32, 4) == (
        "x.json: gradient_accumulation_steps is 2, but training.global_batch_size 32 / (micro-batch 2 x 4 ranks) is 4;"
        " leave the key out"
    )


@pytest.mark.parametrize("micro", [0, -4, 1.5, "large", None, True])
def test_a_micro_batch_that_is_no_size_is_refused(micro: object) -> None:
    assert fault_of({"train_micro_batch_size_per_gpu": micro}, 32, 4) == (
        f'x.json: train_micro_batch_size_per_gpu is {micro!r}, expected a positive number or "auto"'
    )


@pytest.mark.parametrize("accumulation", [0, -4, 1.5, "auto", True])
def test_an_accumulation_that_is_no_number_is_refused(accumulation: object) -> None:
    assert fault_of({"gradient_accumulation_steps": accumulation}, 32, 4) == (
        f"x.json: gradient_accumulation_steps is {accumulation!r}, expected a positive number; leave the key out to"
        " have it worked out"
    )


def test_a_plan_says_what_it_is() -> None:
    assert str(BatchPlan(32, 2, 4, 4)) == "global batch 32 = micro-batch 2 x accumulation 4 x 4 ranks"
