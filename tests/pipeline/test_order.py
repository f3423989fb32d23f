"""The order of a run: every sample of an epoch once, whatever the ranks, blends that are exact at every prefix."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.packing import blend_period
from pipeline.batch import BatchPlan
from pipeline.loader import step_batches
from pipeline.order import LONGEST_PERIOD, Order, shares_of
from pipeline.stages import BatchSizes, continued, interpolated, value_at


def one(size: int, seed: int = 3) -> Order:
    return Order([size], [11], [(0, np.array([1]))], seed)


class Numbers:
    """Stands in for Samples: remembers which numbers are asked for."""

    def batch(self, numbers, step):
        return numbers


@given(
    world=st.integers(1, 64),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    other_world=st.integers(1, 64),
    size=st.integers(1, 500),
    resized_at=st.integers(0, 4),
)
@settings(max_examples=80, deadline=None)
def test_every_sample_of_an_epoch_comes_once_over_all_ranks_also_when_they_change_in_the_middle(
    world, micro, accumulation, other_world, size, resized_at
):
    """The global batch is one of both worlds; the run is resized after some steps."""
    batch = world * other_world * micro * accumulation
    steps = -(-size // batch) + 1
    sizes = BatchSizes({0: batch})
    consumed = []
    for step in range(steps):
        ranks = world if step < resized_at else other_world
        plan = BatchPlan(batch, micro, batch // (ranks * micro), ranks)
        for rank in range(ranks):
            consumed += [number for run in step_batches(Numbers(), step, sizes, plan, rank) for number in run]
    numbers = np.sort(np.array(consumed))
    assert np.array_equal(numbers, np.arange(steps * batch)), "all ranks together take each number once"
    places = one(size).place(numbers[:size])
    assert (places.epoch == 0).all() and np.array_equal(np.sort(places.sample), np.arange(size))


@given(size=st.integers(1, 10**13), number=st.integers(0, 10**15))
@settings(max_examples=60, deadline=None)
def test_a_number_jumped_to_is_what_it_is_among_others(size, number):
    order = one(size)
    alone, among = order.place(np.array([number])), order.place(np.array([0, number + 1, number, 5]))
    assert (alone.epoch[0], alone.sample[0]) == (among.epoch[2], among.sample[2])
    assert alone.epoch[0] == number // size and 0 <= alone.sample[0] < size


def test_the_order_is_uniform():
    """Chi-square over (position, sample) of 4,000 permutations of 12: 121 degrees of freedom, 99.9 % bound."""
    counts = np.zeros((12, 12))
    for seed in range(1000):
        for epoch in range(4):
            samples = one(12, seed).place(np.arange(12) + 12 * epoch).sample
            counts[np.arange(12), samples] += 1
    expected = 4000 / 12
    assert ((counts - expected) ** 2 / expected).sum() < 173.6


def test_neighbours_in_the_order_are_not_neighbours_in_the_corpus():
    """Differences of consecutive samples over a large corpus, in 16 bins: chi-square, 15 degrees, 99.9 %."""
    size = 1 << 20
    samples = one(size).place(np.arange(100_000)).sample
    counts = np.bincount((np.diff(samples) % size) * 16 // size, minlength=16)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 37.7


weights = st.dictionaries(
    st.sampled_from("abcdefg"), st.decimals("0.01", "5", places=2, allow_nan=False).map(float), min_size=2, max_size=7
)


@given(weights=weights)
@settings(max_examples=60, deadline=None)
def test_a_blend_is_within_one_sample_of_its_weights_at_every_prefix(weights):
    names = sorted(weights)
    shares = shares_of(weights, names)
    total = sum(Fraction(repr(weight)) for weight in weights.values())
    exact = np.array([float(Fraction(repr(weights[name])) / total) for name in names])
    order = Order([10**9] * len(names), range(len(names)), [(0, shares)], 1)
    places = order.place(np.arange(3000))
    counts = np.cumsum(places.corpus[:, None] == np.arange(len(names)), axis=0)
    assert np.abs(counts - np.arange(1, 3001)[:, None] * exact).max() < 1
    assert np.array_equal(order.consumed(3000), counts[-1])
    far = order.consumed(10**12)
    assert np.abs(far - 10**12 * exact).max() < 1.001 and far.sum() == 10**12  # float64 rounds the product


def test_weights_without_a_short_period_are_rounded_to_millionths():
    shares = shares_of({"a": 0.123456789, "b": 0.876543211, "c": 1e-9}, ["a", "b", "c", "d"])
    assert shares.sum() == LONGEST_PERIOD
    assert shares.tolist() == [123456, 876543, 1, 0], "none of those asked for is lost"


@given(shares=st.lists(st.integers(0, 40), min_size=2, max_size=8).filter(sum))
@settings(max_examples=100, deadline=None)
def test_a_period_gives_each_component_its_places_and_numbers_them(shares):
    component, rank = blend_period(np.array(shares))
    assert np.bincount(component, minlength=len(shares)).tolist() == shares
    for which, share in enumerate(shares):
        assert rank[component == which].tolist() == list(range(share))
    counts = np.cumsum(component[:, None] == np.arange(len(shares)), axis=0)
    quota = np.arange(1, len(component) + 1)[:, None] * np.array(shares) / sum(shares)
    assert np.abs(counts - quota).max() < 1


def test_each_corpus_is_read_epoch_after_epoch_in_another_permutation():
    order = Order([7, 50], [1, 2], [(0, shares_of({"a": 0.5, "b": 0.5}, ["a", "b"]))], 1)
    places = order.place(np.arange(100))
    small = places.sample[places.corpus == 0]
    epochs = [small[start : start + 7] for start in range(0, 49, 7)]
    assert all(np.array_equal(np.sort(epoch), np.arange(7)) for epoch in epochs)
    assert len({epoch.tobytes() for epoch in epochs}) > 1
    assert places.epoch[places.corpus == 0].tolist() == [i // 7 for i in range(50)]
    assert np.array_equal(np.sort(places.sample[places.corpus == 1]), np.arange(50))


def test_a_later_stage_leaves_what_came_before_and_goes_on_within_each_corpus():
    names, sizes, keys = ["a", "b", "c"], [100, 60, 30], [5, 6, 7]
    first, second = {"a": 0.75, "b": 0.25}, {"a": 0.2, "b": 0.2, "c": 0.6}
    plain = Order(sizes, keys, [(0, shares_of(first, names))], 1)
    staged = Order(sizes, keys, [(0, shares_of(first, names)), (37, shares_of(second, names))], 1)
    before, after = plain.place(np.arange(37)), staged.place(np.arange(200))
    for name in ("corpus", "epoch", "sample"):
        assert np.array_equal(getattr(before, name), getattr(after, name)[:37])
    later = after.corpus[37:]
    counts = np.cumsum(later[:, None] == np.arange(3), axis=0)
    assert np.abs(counts - np.arange(1, 164)[:, None] * [0.2, 0.2, 0.6]).max() < 1
    for which, size in enumerate(sizes):  # no sample of an epoch is skipped or repeated at the change
        taken = after.sample[after.corpus == which][:size]
        assert len(np.unique(taken)) == len(taken)
    assert staged.consumed(37).tolist() == np.bincount(before.corpus, minlength=3).tolist()


def test_the_order_within_a_corpus_does_not_depend_on_the_others():
    alone = Order([100], [5], [(0, np.array([1]))], 1).place(np.arange(40)).sample
    blended = Order([30, 100], [9, 5], [(0, np.array([1, 1]))], 1).place(np.arange(80))
    assert np.array_equal(blended.sample[blended.corpus == 1], alone)


ramps = st.dictionaries(st.integers(1, 60), st.integers(1, 50), max_size=4).map(lambda d: {0: 4, **d})


@given(stages=ramps, step=st.integers(0, 100))
@settings(max_examples=80, deadline=None)
def test_a_ramp_walked_is_a_ramp_jumped_to(stages, step):
    sizes = BatchSizes(stages)
    walked = [sizes.at(s) for s in range(step)]
    assert sizes.first_sample(step) == sum(walked)
    assert walked == [stages[max(start for start in stages if start <= s)] for s in range(step)]
    if step:
        assert sizes.steps_for(sum(walked)) == step
        assert sizes.steps_for(sum(walked) - walked[-1] + 1) == step


@given(before=ramps, after=ramps, step=st.integers(0, 80))
@settings(max_examples=80, deadline=None)
def test_what_a_run_had_stays_and_what_it_is_to_have_begins_where_it_goes_on(before, after, step):
    both = continued(before, after, step)
    assert min(both) == 0
    for at in range(100):
        assert value_at(both, at) == value_at(before if at < step else after, at)


def test_rates_run_straight_between_their_points():
    points = {0: 0.3, 100: 0.2, 300: 0.1}
    assert [interpolated(points, step) for step in (0, 50, 100, 200, 300, 999)] == pytest.approx(
        [0.3, 0.25, 0.2, 0.15, 0.1, 0.1]
    )
    assert interpolated({10: 0.3, 20: 0.2}, 0) == 0.3 and interpolated(0.15, 7) == 0.15
