"""Masks for masked-LM: which tokens of a row are targets, and what is shown in their place.

A row's masks are a pure function of its ids, its key, the rates and where document parts begin in it. Three units:

token   each token is a target or not, independently (Devlin et al. 2019, "BERT", section 3.1), drawn anew under another
        key (Liu et al. 2019, "RoBERTa", section 4.1).
word    each word is, with all its pieces (whole word masking, as in BERT's released create_pretraining_data.py: what is
        shown is drawn for each piece). `pipeline.words` says what a word is.
span    stretches of words are (Joshi et al. 2020, "SpanBERT", section 3.1). What is shown is drawn once for a span,
        random tokens for each token of it; spans that overlap or touch are one (as in its released masking.py).

By each of them an ordinary token is a target with the given probability, wherever it stands. Special tokens are never
targets, nor shown as random tokens. No word or span runs over a special token or the beginning of a document part: what
is left of a word there is a word of its own.
"""

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.encoding import SpecialTokens
from data_prep.errors import UserError
from data_prep.randomness import UInt64, hash64, hash64_rows

# A hash is two draws of 32 bits. The upper half of a position's hash says whether a token, word or span is chosen
# there, the lower half what is shown, or how long the span is. The hash of that hash gives two more.
_HALF = np.uint64(32)
_LOWER = np.uint64(0xFFFFFFFF)
_WHOLE = 1 << 32

_BEGINS, _SPECIAL = 1, 2  # what `Masking._codes` says of an id


@dataclass(frozen=True)
class MaskRates:
    """probability: share of the ordinary tokens that are targets. mask, random: shares of the targets that are shown as
    the mask token and as a random token; the rest stay."""

    probability: float
    mask: float
    random: float


class Masking:
    """The masks of one unit ("token", "word" or "span") for the ids of one tokenizer.

    word_starts: whether each id begins a word [vocab_size]; words and spans need it.
    span_p, span_max: of the lengths of spans (`span_lengths`).
    further_special: special tokens that `special` has no role for.

    Raises UserError when the tokenizer has no mask token.
    """

    def __init__(
        self,
        *,
        unit: str,
        special: SpecialTokens,
        vocab_size: int,
        word_starts: NDArray[np.bool_] | None,
        span_p: float = 0.2,
        span_max: int = 10,
        further_special: Iterable[int] = (),
    ) -> None:
        if special.mask is None:
            raise UserError("data.tokenizer has no mask token ([MASK]), which objective mlm needs")
        self._unit, self._mask = unit, special.mask
        self._is_special = np.zeros(vocab_size, dtype=bool)
        self._is_special[[*(token for token in vars(special).values() if token is not None), *further_special]] = True
        self._ordinary = np.flatnonzero(~self._is_special)
        if unit != "token":
            assert word_starts is not None and len(word_starts) == vocab_size
            self._codes = np.where(self._is_special, _SPECIAL, np.where(word_starts, _BEGINS, 0)).astype(np.uint8)
            self._lengths = span_lengths(span_p, span_max)
            self._longer_from = _limits(itertools.accumulate(self._lengths[:-1]))

    def apply(
        self, ids: NDArray[Any], keys: UInt64, rates: MaskRates, starts: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Masks `ids` in place: [batch, sequence], integers of any type, C-contiguous.

        keys: of the rows, hashes [batch]. starts: whether a document part begins there [batch, sequence]; None where
        every row is one part.

        Returns the positions of the targets in the flattened ids, increasing, and what stood there [targets].
        """
        assert ids.flags.c_contiguous
        limit = round(rates.probability * _WHOLE)
        if not limit or not ids.size:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=ids.dtype)
        flat = ids.reshape(-1)
        hashes = hash64_rows(keys, ids.shape[1]).reshape(-1)
        if self._unit == "token":
            targets = np.flatnonzero(_chosen(hashes, limit))
            targets = targets[~self._is_special.take(flat.take(targets))]
            draws = hashes.take(targets) & _LOWER
        elif self._unit == "word":
            words, _ = self._words(ids, starts)
            chosen = np.flatnonzero(_chosen(hashes.take(words[:-1]), limit))
            chosen = chosen[~self._is_special.take(flat.take(words.take(chosen)))]
            targets = _stretches(words.take(chosen), words.take(chosen + 1))
            draws = hashes.take(targets) & _LOWER
        else:
            begins, ends = self._spans(ids, hashes, rates.probability, starts)
            targets = _stretches(begins, ends)
            draws = np.repeat(hash64(hashes.take(begins)) >> _HALF, ends - begins)
        originals = flat.take(targets)
        masked = round(rates.mask * _WHOLE)
        flat[targets[draws < masked]] = self._mask
        random = targets[(draws >= masked) & (draws < masked + round(rates.random * _WHOLE))]
        # The lower half of the hash, scaled to the number of ordinary ids (Lemire 2019).
        drawn = (hash64(hashes.take(random)) & _LOWER) * np.uint64(len(self._ordinary)) >> _HALF
        flat[random] = self._ordinary.take(drawn.astype(np.int64))
        return targets, originals

    def _words(
        self, ids: NDArray[Any], starts: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where words begin in the flattened ids, and the end [words + 1]; the same of the stretches that no word or
        span leaves [stretches + 1]. Every special token is a stretch of one word."""
        codes = self._codes.take(ids)
        special = codes >> 1
        begins_stretch = special.copy()
        begins_stretch[:, 1:] |= special[:, :-1]
        begins_stretch[:, 0] = 1
        if starts is not None:
            begins_stretch |= starts
        codes &= _BEGINS
        codes |= begins_stretch
        words, stretches = (np.flatnonzero(begins.view(np.bool_)) for begins in (codes, begins_stretch))
        return np.append(words, ids.size), np.append(stretches, ids.size)

    def _spans(
        self, ids: NDArray[Any], hashes: UInt64, probability: float, starts: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where spans begin and end in the flattened ids, those that overlap or touch as one [spans]."""
        words, stretches = self._words(ids, starts)
        stretches = np.searchsorted(words, stretches)
        limits = _start_limits(probability, self._lengths)
        chosen = np.flatnonzero(_chosen(hashes.take(words[:-1]), int(limits.max())))
        chosen = chosen[~self._is_special.take(ids.reshape(-1).take(words.take(chosen)))]
        stretch = np.searchsorted(stretches, chosen, side="right")
        number = np.minimum(chosen - stretches.take(stretch - 1), len(limits) - 1)
        kept = hashes.take(words.take(chosen)) >> _HALF < limits.take(number)
        chosen, stretch = chosen[kept], stretch[kept]
        begins = words.take(chosen)
        length = 1 + np.searchsorted(self._longer_from, hashes.take(begins) & _LOWER, side="right")
        ends = np.maximum.accumulate(words.take(np.minimum(chosen + length, stretches.take(stretch))))
        first = np.ones(len(chosen), dtype=bool)
        first[1:] = (begins[1:] > ends[:-1]) | (stretch[1:] != stretch[:-1])
        last = np.append(first[1:], True)[: len(first)]
        return begins[first], ends[last]


def span_lengths(p: float, longest: int) -> tuple[float, ...]:
    """The probability of each length of a span, in words, from 1 to `longest`.

    A geometric distribution, P(n) = p (1 - p)^(n - 1), cut off and scaled to add up to 1. With SpanBERT's p = 0.2 and
    longest = 10 the mean is 3.8 words, as in its section 3.1; were longer spans shortened to 10, it would be 4.5.
    """
    weights = list(itertools.accumulate(range(longest - 1), lambda weight, _: weight * (1 - p), initial=1.0))
    return tuple(weight / math.fsum(weights) for weight in weights)


def span_start_rates(probability: float, lengths: tuple[float, ...]) -> list[float]:
    """The probability that a span begins at word 0, 1, 2, ... of a stretch, such that each is covered by one or more
    with `probability`; the last one holds for all words from there on.

    Spans begin independently of one another. One that begins k words before word i covers it if it is longer than k, so
    word i stays uncovered with the probability

        (1 - r[i]) (1 - r[i-1] P(length > 1)) (1 - r[i-2] P(length > 2)) ...   over the words of the stretch,

    which is 1 - probability if r[i] = 1 - (1 - probability) / (the other factors). That is never negative: with
    P(length > k) for P(length > k + 1) the other factors are what left word i - 1 uncovered.
    """
    longer = [math.fsum(lengths[k:]) for k in range(len(lengths))]
    rates: list[float] = []
    while len(rates) <= len(lengths) or max(rates[-len(lengths) :]) - min(rates[-len(lengths) :]) > 2.0**-34:
        others = math.prod(1 - r * p for r, p in zip(reversed(rates), longer[1:], strict=False))
        rates.append(1 - (1 - probability) / others)
    return rates


@functools.lru_cache
def _start_limits(probability: float, lengths: tuple[float, ...]) -> UInt64:
    return _limits(span_start_rates(probability, lengths))


def _limits(probabilities: Iterable[float]) -> UInt64:
    """A draw of 32 bits is below the limit with that probability."""
    return np.array([round(probability * _WHOLE) for probability in probabilities], dtype=np.uint64)


def _chosen(hashes: UInt64, limit: int) -> NDArray[np.bool_]:
    """Whether the upper half of each is below `limit`, from 1 to 2**32, without taking it out."""
    return hashes <= np.uint64((limit << 32) - 1)


def _stretches(begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """All positions from each begin to its end."""
    lengths = ends - begins
    done = np.cumsum(lengths)
    return np.repeat(begins - (done - lengths), lengths) + np.arange(done[-1] if len(done) else 0)
