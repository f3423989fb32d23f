"""The order of a run: which sample of which corpus is consumed as number n, in constant memory and time.

A run consumes numbers 0, 1, 2, ... Ranks, micro-batches, workers and interruptions do not enter, and any number can be
asked for. Several corpora take turns so that after every number each has had its share of them to within one sample;
a corpus's own samples come epoch after epoch, each epoch in another pseudo-random permutation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from data_prep.packing import blend_period
from data_prep.randomness import permute

LONGEST_PERIOD = 1_000_000
"""Weights without a common denominator up to this are rounded to so many parts of their sum."""
_ORDER = 1  # first coordinate of what is drawn here; pipeline.samples has the others


@dataclass(frozen=True)
class Places:
    """Samples by corpus, epoch of that corpus, and index in it; arrays [batch]."""

    corpus: NDArray[np.int64]
    epoch: NDArray[np.int64]
    sample: NDArray[np.int64]


def shares_of(weights: Mapping[str, float], names: Sequence[str]) -> NDArray[np.int64]:
    """Places of each of `names` in a period of the blend, in proportion to the weights; 0 for a name without one.

    Exact where the weights, read as decimal numbers, have a common denominator of at most LONGEST_PERIOD; otherwise
    rounded to that many parts by largest remainder, at least one for a weight above 0.
    """
    exact = [Fraction(repr(weights.get(name, 0.0))) for name in names]
    total = sum(exact)
    parts = [weight / total for weight in exact]
    period = np.lcm.reduce([part.denominator for part in parts], dtype=object)
    if period > LONGEST_PERIOD:
        period = LONGEST_PERIOD
    shares = np.array([max(int(part * period), int(part > 0)) for part in parts], dtype=np.int64)
    lost = [part * period - int(share) for part, share in zip(parts, shares, strict=True)]
    while (missing := int(period) - int(shares.sum())) != 0:
        index = max(range(len(lost)), key=lost.__getitem__) if missing > 0 else int(shares.argmax())
        shares[index] += 1 if missing > 0 else -1
        lost[index] -= 1 if missing > 0 else -1
    return shares


@dataclass(frozen=True)
class _Stage:
    """Numbers from `first` on, blended in one proportion. before: samples of each corpus consumed by then."""

    first: int
    shares: NDArray[np.int64]
    before: NDArray[np.int64]
    component: NDArray[np.int32]
    rank: NDArray[np.int32]


class Order:
    """The order of the training samples of some corpora.

    sizes: samples of each corpus. keys: a number for each that is its own wherever it is used, so that its order does
    not depend on the others. stages: (first number, shares of the corpora as `shares_of` gives them), the first at 0;
    a later stage leaves what came before it as it was.
    """

    def __init__(
        self, sizes: Sequence[int], keys: Sequence[int], stages: Sequence[tuple[int, NDArray[np.int64]]], seed: int
    ) -> None:
        self.sizes, self._keys, self._seed = np.array(sizes, dtype=np.int64), list(keys), seed
        self._stages: list[_Stage] = []
        for first, shares in stages:
            before = self.consumed(first)
            self._stages.append(_Stage(first, shares, before, *blend_period(shares) if len(sizes) > 1 else _ALONE))

    def _turns(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Corpus of each number, and how many samples of that corpus come before it [batch]."""
        corpus, index = np.zeros_like(numbers), numbers.copy()
        if len(self.sizes) > 1:
            of_stage = np.searchsorted([stage.first for stage in self._stages], numbers, side="right") - 1
            for number in np.unique(of_stage):
                stage, chosen = self._stages[number], of_stage == number
                periods, places = np.divmod(numbers[chosen] - stage.first, len(stage.component))
                turn = stage.component[places]
                corpus[chosen] = turn
                index[chosen] = stage.before[turn] + periods * stage.shares[turn] + stage.rank[places]
        return corpus, index

    def place(self, numbers: NDArray[np.int64]) -> Places:
        """What is consumed as these numbers [batch]."""
        corpus, index = self._turns(numbers)
        epoch, position = np.divmod(index, self.sizes[corpus])
        sample = np.empty_like(position)
        for which, number in set(zip(corpus.tolist(), epoch.tolist(), strict=True)):
            chosen = (corpus == which) & (epoch == number)
            sample[chosen] = self.shuffled(which, number, position[chosen])
        return Places(corpus, epoch, sample)

    def shuffled(self, corpus: int, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at these positions of one corpus's epoch."""
        return permute(positions, int(self.sizes[corpus]), _ORDER, self._seed, self._keys[corpus], epoch)

    def consumed(self, number: int) -> NDArray[np.int64]:
        """Samples of each corpus among the numbers before `number` [corpora]."""
        if len(self.sizes) == 1:
            return np.array([number], dtype=np.int64)
        stage = next((stage for stage in reversed(self._stages) if stage.first <= number), None)
        if stage is None:
            return np.zeros(len(self.sizes), dtype=np.int64)
        periods, places = divmod(number - stage.first, len(stage.component))
        turns = np.bincount(stage.component[:places], minlength=len(self.sizes))
        return stage.before + periods * stage.shares + turns


_ALONE = (np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int32))
