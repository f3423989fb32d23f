"""The learning rate of every update: those of torch and transformers step by step, and values worked by hand."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipeline.recipe import Recipe, check_recipe
from pipeline.schedule import learning_rate

PEAK = 1e-3
SHAPES = ["cosine", "linear", "constant", "wsd", "inverse_sqrt", "one_cycle"]


def with_schedule(shape: str, *, steps: int, batch: Any = 8, length: int = 16, **schedule: Any) -> Recipe:
    raw = {
        "objective": "causal",
        "model": {"config": "demo-gpt"},
        "data": {"shards": "s", "tokenizer": "t", "sequence_length": length},
        "training": {"global_batch_size": batch, "max_steps": steps},
        "optimizer": {"lr": PEAK},
        "schedule": {"type": shape, **schedule},
    }
    return check_recipe(raw, "r.yaml")


def rates(recipe: Recipe, steps: int | None = None) -> list[float]:
    return [learning_rate(recipe, step) for step in range(recipe.max_steps if steps is None else steps)]


def torch_optimizer() -> Any:
    import torch

    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


# By hand.


@pytest.mark.parametrize(
    ("shape", "step", "rate"),
    [
        ("wsd", 8, 9e-4),
        ("wsd", 9, 1e-3),  # the tenth update has the peak
        ("wsd", 60, 1e-3),
        ("wsd", 70, 1e-3),  # the last of the plateau: 40 follow
        ("wsd", 80, 1e-4 + 9e-4 * 0.5),  # a quarter of the decay: 1 - sqrt(1/4)
        ("wsd", 110, 1e-4),
        ("inverse_sqrt", 4, 5e-4),
        ("inverse_sqrt", 9, 1e-3),
        ("inverse_sqrt", 39, 5e-4),  # the 40th update: sqrt(10 / 40)
        ("inverse_sqrt", 89, 1e-3 / 3),
        ("inverse_sqrt", 999, 1e-4),
        ("inverse_sqrt", 99_999, 1e-4),  # sqrt(10 / 100 000) is 1 %: below the smallest
        ("one_cycle", 0, 4e-5),  # a 25th
        ("one_cycle", 9, 1e-3),
        ("one_cycle", 110, 1e-4),
    ],
)
def test_hand_worked_learning_rates(shape: str, step: int, rate: float) -> None:
    extra = {"decay_steps": 40} if shape == "wsd" else {}
    recipe = with_schedule(shape, steps=111, warmup_steps=10, min_lr=1e-4, **extra)
    assert learning_rate(recipe, step) == pytest.approx(rate, rel=1e-12)


def test_the_decay_of_wsd_is_a_fifth_of_the_run_unless_said_otherwise() -> None:
    for given_, decayed in (({}, 20), ({"decay_fraction": 0.5}, 50), ({"decay_steps": 7}, 7)):
        found = rates(with_schedule("wsd", steps=100, warmup_steps=3, **given_))
        assert sum(rate < PEAK for rate in found[3:]) == decayed
        assert found[-1] == 0


def test_a_trial_shorter_than_the_decay_of_wsd_goes_down_over_what_there_is() -> None:
    found = rates(with_schedule("wsd", steps=11, warmup_steps=5, decay_steps=1000, decay_shape="linear"))
    assert found[4:] == pytest.approx([PEAK * left / 5 for left in (5, 5, 4, 3, 2, 1, 0)], abs=1e-18)


# Against other implementations.


@pytest.mark.parametrize("shape", ["1-sqrt", "linear"])
@pytest.mark.parametrize(("warmup", "plateau", "decay", "low"), [(0, 10, 5, 0.0), (7, 20, 13, 1e-4), (3, 0, 9, 0.0)])
def test_wsd_is_that_of_transformers(shape: str, warmup: int, plateau: int, decay: int, low: float) -> None:
    """Theirs rises from the smallest rate at update 0; ours from 0, and skips the update without effect."""
    from transformers import get_wsd_schedule

    scheduler = get_wsd_schedule(
        torch_optimizer(), num_warmup_steps=warmup, num_decay_steps=decay, num_stable_steps=plateau,
        min_lr_ratio=low / PEAK, decay_type=shape,
    )  # fmt: skip
    factor = scheduler.lr_lambdas[0]
    recipe = with_schedule(
        "wsd", steps=warmup + plateau + decay + 1, warmup_steps=warmup, min_lr=low, decay_steps=decay, decay_shape=shape
    )
    for step, rate in enumerate(rates(recipe)):
        from_low = (factor(step + 1) - low / PEAK) / (1 - low / PEAK)
        assert rate == pytest.approx(PEAK * (from_low if step < warmup else factor(step)), rel=1e-12, abs=1e-18), step


@pytest.mark.parametrize("warmup", [1, 5, 40])
def test_inverse_sqrt_is_that_of_transformers_an_update_on(warmup: int) -> None:
    from transformers import get_inverse_sqrt_schedule

    factor = get_inverse_sqrt_schedule(torch_optimizer(), num_warmup_steps=warmup).lr_lambdas[0]
    for step, rate in enumerate(rates(with_schedule("inverse_sqrt", steps=200, warmup_steps=warmup))):
        assert rate == pytest.approx(PEAK * factor(step + 1), rel=1e-12), step


@pytest.mark.parametrize(("warmup", "steps", "low"), [(30, 100, 1e-6), (2, 9, 1e-5), (15, 20, 4e-5), (50, 51, 0.0)])
def test_one_cycle_is_torchs_with_cosines(warmup: int, steps: int, low: float) -> None:
    import torch

    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        torch_optimizer(), PEAK, total_steps=steps, pct_start=warmup / steps, anneal_strategy="cos",
        cycle_momentum=False, div_factor=25, final_div_factor=PEAK / 25 / low if low else math.inf,
    )  # fmt: skip
    for step, rate in enumerate(rates(with_schedule("one_cycle", steps=steps, warmup_steps=warmup, min_lr=low))):
        assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-18), step
        scheduler.optimizer.step()
        if step < steps - 1:
            scheduler.step()


# Warm-up in tokens.


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_ramp_a_warmup_in_tokens_is_one_in_steps(shape: str) -> None:
    in_steps = with_schedule(shape, steps=60, warmup_steps=10, min_lr=1e-5)
    in_tokens = with_schedule(shape, steps=60, warmup_tokens=10 * 8 * 16, min_lr=1e-5)
    assert rates(in_tokens) == pytest.approx(rates(in_steps), rel=1e-12)


def test_a_warmup_in_tokens_follows_the_ramp_of_the_batch() -> None:
    # Steps of 32, 32, 64, 64, 64 tokens: 32, 64, 128, 192, 256 seen.
    recipe = with_schedule("constant", steps=9, batch={0: 2, 2: 4}, warmup_tokens=200)
    assert rates(recipe) == pytest.approx([PEAK * seen / 200 for seen in (32, 64, 128, 192)] + [PEAK] * 5, rel=1e-12)


def test_a_decay_begins_where_the_tokens_of_the_warmup_end() -> None:
    ramp = {0: 2, 2: 4}
    recipe = with_schedule("linear", steps=10, batch=ramp, warmup_tokens=256)  # seen with the fifth update
    assert rates(recipe)[4:] == pytest.approx([PEAK] + [PEAK * left / 4 for left in (4, 3, 2, 1, 0)], abs=1e-18)


# What holds for all.


@given(
    shape=st.sampled_from(SHAPES),
    warmup=st.integers(1, 60),
    steps=st.integers(1, 60),
    low=st.floats(0, 1),
    in_tokens=st.booleans(),
    ramp=st.dictionaries(st.integers(1, 40), st.integers(1, 9), max_size=3),
)
def test_the_rate_rises_to_the_peak_and_never_leaves_its_bounds(
    shape: str, warmup: int, steps: int, low: float, in_tokens: bool, ramp: dict[int, int]
) -> None:
    batch = {0: 3, **ramp}
    extent = {"warmup_tokens": 16 * 3 * warmup} if in_tokens else {"warmup_steps": warmup}
    recipe = with_schedule(shape, steps=steps, batch=batch, min_lr=low * PEAK, **extent)
    found = rates(recipe)
    top = found.index(max(found))
    assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in found[: top + 1])
    assert found[: top + 1] == sorted(found[: top + 1])
    falling = found[top:]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(falling))
    done = recipe.training.batch_sizes.first_sample(steps) * 16 >= extent["warmup_tokens"] if in_tokens else None
    if done or (done is None and warmup <= steps):
        assert max(found) == pytest.approx(PEAK)
        assert all(rate >= low * PEAK * (1 - 1e-12) for rate in falling)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_long_run_has_no_jumps(shape: str) -> None:
    found = rates(with_schedule(shape, steps=10_000, warmup_steps=1000, min_lr=1e-5))
    largest = max(abs(after - before) for before, after in itertools.pairwise(found))
    # 1 - sqrt begins steeply: 1 / sqrt(2000) of the way in one step.
    assert largest < (0.025 if shape == "wsd" else 0.002) * PEAK


@pytest.mark.parametrize("shape", ["wsd", "inverse_sqrt", "constant"])
def test_a_longer_run_has_the_same_beginning(shape: str) -> None:
    extra = {"decay_steps": 30} if shape == "wsd" else {}
    short = with_schedule(shape, steps=200, warmup_steps=10, **extra)
    longer = with_schedule(shape, steps=1000, warmup_steps=10, **extra)
    kept = 200 - 30 if shape == "wsd" else 200
    assert rates(short, kept) == rates(longer, kept)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rate_of_a_step_depends_on_nothing_that_came_before(shape: str) -> None:
    recipe = with_schedule(shape, steps=40, warmup_tokens=700, min_lr=1e-5)
    assert [learning_rate(recipe, step) for step in reversed(range(40))] == rates(recipe)[::-1]


@pytest.mark.parametrize(
    ("shape", "schedule", "message"),
    [
        (
            "cosine",
            {"warmup_steps": 3, "warmup_tokens": 100},
            "give either schedule.warmup_steps or schedule.warmup_tokens",
        ),
        (
            "wsd",
            {"decay_steps": 3, "decay_fraction": 0.1},
            "give either schedule.decay_steps or schedule.decay_fraction",
        ),
        ("cosine", {"decay_steps": 3}, "schedule.decay_steps does nothing for type cosine; leave it out, or take wsd"),
        (
            "linear",
            {"decay_shape": "linear"},
            "schedule.decay_shape does nothing for type linear; leave it out, or take wsd",
        ),
        ("inverse_sqrt", {}, "schedule.type inverse_sqrt needs a warm-up; give warmup_steps or warmup_tokens"),
        ("one_cycle", {}, "schedule.type one_cycle needs a warm-up; give warmup_steps or warmup_tokens"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(shape: str, schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        with_schedule(shape, steps=10, **schedule)
    assert str(caught.value) == f"r.yaml: schedule: {message}"
