"""Samples: what the model sees at sample number n of a run, as a pure function of (recipe, seed, n).

Where a sample comes from is `pipeline.order`'s, its tokens are `pipeline.rows`'; this module says what is to be
predicted and who sees whom. What is drawn for a row hangs on a key made of (seed, split, corpus, epoch, sample), so
neither the batch that it is in nor the hardware enters.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.encoding import SpecialTokens
from data_prep.randomness import UInt64, hash64
from pipeline.causal import Sentinels, fill_in_the_middle, goldfish
from pipeline.masking import Masking, MaskRates
from pipeline.order import Order, Places
from pipeline.recipe import CausalSection, CurriculumSection, MaskingSection
from pipeline.rows import Corpus, RowMaker, Rows
from pipeline.stages import interpolated
from pipeline.token_files import Stretch

IGNORED = -100
"""Label of a position that is no target (torch.nn.functional.cross_entropy's default ignore_index)."""

# First coordinate of what is drawn, so that no two purposes share random numbers: 1 is pipeline.order's, 3 and 4
# pipeline.rows', 5 pipeline.engine's, 6 data_prep.plan's, 7 pipeline.token_drop's.
_ROW = 2
_SPLITS = {"train": 0, "validation": 1}


@dataclass(frozen=True)
class Batch:
    """Rows of samples, in the shards' own integer type.

    input_ids: [batch, sequence]. targets: positions in the flattened batch that are to be predicted, increasing
    [targets]; None: all of them. target_ids: what they are, [targets], or [batch, sequence] where all are.
    boundaries: where documents begin in the flattened batch, and its end [documents + 1], as attention is to keep them
    apart (padding at the end of a row counts as one, and every row begins one); None: rows are seen whole. longest:
    tokens of the longest of these documents.
    places: where the rows come from.
    token_types: 0 or 1, for pairs [batch, sequence]. pair_labels: 1 where the second of a pair is from another document
    (nsp) or the two are turned around (sop), -100 in rows that do not count [batch].
    kept_positions: what each layer that drops tokens sees of each row [layers, batch, kept]; None: all.
    """

    input_ids: NDArray[Any]
    target_ids: NDArray[Any]
    targets: NDArray[np.int64] | None
    boundaries: NDArray[np.int32] | None
    longest: int
    places: Places
    token_types: NDArray[np.uint8] | None = None
    pair_labels: NDArray[np.int64] | None = None
    kept_positions: NDArray[np.int32] | None = None

    @property
    def target_count(self) -> int:
        return int(self.target_ids.size)

    @functools.cached_property
    def labels(self) -> NDArray[np.int64]:
        """What each position is to predict, IGNORED where nothing [batch, sequence]."""
        if self.targets is None:
            return self.target_ids.astype(np.int64)
        labels = np.full(self.input_ids.shape, IGNORED, dtype=np.int64)
        labels.reshape(-1)[self.targets] = self.target_ids
        return labels


@dataclass(frozen=True)
class Style:
    """How rows are made, in the words of the recipe. word_starts: of masking's words, where they are asked for.
    sentinels: of fill-in-the-middle, likewise. further_special: ids of special tokens without a role."""

    special: SpecialTokens
    vocab_size: int
    document_attention: bool = True
    masking: MaskingSection = field(default_factory=MaskingSection)
    causal: CausalSection = field(default_factory=CausalSection)
    curriculum: CurriculumSection = field(default_factory=CurriculumSection)
    word_starts: NDArray[np.bool_] | None = None
    further_special: tuple[int, ...] = ()
    sentinels: Sentinels | None = None


class Samples:
    """The samples of one split over one or several corpora.

    order: of training. Raises UserError when the tokenizer lacks a token that the objective needs, or a shard is not
    what its manifest says.
    """

    def __init__(self, corpora: tuple[Corpus, ...], order: Order, split: str, style: Style, seed: int) -> None:
        self.corpora, self.order = corpora, order
        self._split, self._seed, self._style = _SPLITS[split], seed, style
        self._corpus_keys = np.array([corpus.key for corpus in corpora], dtype=np.uint64)
        self._rows = RowMaker(corpora, split, style.special)
        self.sizes = self._rows.sizes
        settings = self._rows.settings
        self.sequence_length, self.is_causal = settings.sequence_length, settings.objective == "causal"
        self._end = style.special.end_of_document
        if not self.is_causal:
            self._masking = Masking(
                unit=style.masking.unit,
                special=style.special,
                vocab_size=style.vocab_size,
                word_starts=style.word_starts,
                further_special=style.further_special,
            )

    @property
    def size(self) -> int:
        """Samples of an epoch over all corpora."""
        return sum(self.sizes)

    def batch(self, numbers: NDArray[np.int64], step: int = 0) -> Batch:
        """The samples that a run consumes as these numbers at this step [batch]."""
        return self.batch_at(self.order.place(np.asarray(numbers, dtype=np.int64)), step)

    def batch_at(self, places: Places, step: int = 0, real: NDArray[np.bool_] | None = None) -> Batch:
        """The samples at these places [batch]. step: where the recipe's schedules are taken. real: rows that have
        targets (None: all)."""
        rows = self._rows.rows(places, lambda: self.keys(places))
        batch = (self._causal if self.is_causal else self._masked)(rows, places, step)
        if real is None or real.all():
            return batch
        labels = batch.labels
        labels[~real] = IGNORED
        targets = np.flatnonzero(labels != IGNORED)
        pair_labels = None if batch.pair_labels is None else np.where(real, batch.pair_labels, IGNORED)
        return replace(batch, target_ids=labels.reshape(-1)[targets], targets=targets, pair_labels=pair_labels)

    def held_out(self, count: int) -> Places:
        """Places of `count` samples of the first epoch, of each corpus equally many as far as it has them."""
        counts = [0] * len(self.sizes)
        for _ in range(min(count, self.size)):
            having = [corpus for corpus, size in enumerate(self.sizes) if counts[corpus] < size]
            counts[min(having, key=counts.__getitem__)] += 1
        found = [self.order.shuffled(corpus, 0, np.arange(number)) for corpus, number in enumerate(counts)]
        corpora = np.repeat(np.arange(len(counts)), counts)
        return Places(corpora, np.zeros_like(corpora), np.concatenate(found))

    def origins(self, places: Places) -> list[list[Stretch]]:
        """The stretches of documents that each of these samples is made of, in order [batch]."""
        return self._rows.origins(places, lambda: self.keys(places))

    def keys(self, places: Places) -> UInt64:
        """A hash of each place [batch]."""
        corpus_keys = self._corpus_keys[places.corpus] if len(self.corpora) > 1 else self.corpora[0].key
        return hash64(_ROW, self._seed, self._split, corpus_keys, places.epoch, places.sample)

    def _causal(self, rows: Rows, places: Places, step: int) -> Batch:
        style = self._style.causal
        boundaries, longest = self._seen(rows, step)
        if rows.ids.shape[1] > self.sequence_length and style.fim_rate == 0:
            inputs, labels = rows.ids[:, :-1], rows.ids[:, 1:]
        else:
            inputs, labels = self._turned(rows, places)
        left_out = []
        if rows.padded.any():
            left_out.append(np.repeat(rows.padded, np.diff(rows.boundaries)).reshape(labels.shape))
        if not style.loss_after_end:
            left_out.append(inputs == self._end)
        if style.goldfish_k:
            left_out.append(goldfish(labels, rows.boundaries, k=style.goldfish_k, context=style.goldfish_context))
        if not left_out:
            return Batch(inputs, labels, None, boundaries, longest, places)
        targets = np.flatnonzero(~functools.reduce(np.logical_or, left_out))
        return Batch(inputs, labels.reshape(-1)[targets], targets, boundaries, longest, places)

    def _turned(self, rows: Rows, places: Places) -> tuple[NDArray[Any], NDArray[Any]]:
        """Inputs and labels [batch, sequence], some documents turned for fill-in-the-middle."""
        style = self._style.causal
        first = rows.boundaries[:-1]
        labels, first_ids = rows.ids, rows.first_ids
        if labels.shape[1] > self.sequence_length:
            labels = np.ascontiguousarray(rows.ids[:, 1:])
            # A row of the flattened ids is one token longer.
            first_ids = rows.ids.reshape(-1)[first + first // self.sequence_length]
        if style.fim_rate > 0:
            assert self._style.sentinels is not None
            fill_in_the_middle(
                labels,
                rows.boundaries,
                self.keys(places),
                ~rows.padded,
                rate=style.fim_rate,
                spm_rate=style.fim_spm_rate,
                sentinels=self._style.sentinels,
                end_of_document=self._end,
            )
            changed = labels.reshape(-1)[first] == self._style.sentinels.prefix
            first_ids[changed] = self._end  # nothing of a document stands before its prefix
        inputs = np.empty_like(labels)
        inputs[:, 1:] = labels[:, :-1]
        inputs.reshape(-1)[first] = first_ids
        return inputs, labels

    def _masked(self, rows: Rows, places: Places, step: int) -> Batch:
        masking = self._style.masking
        rates = MaskRates(*(interpolated(rate, step) for rate in (masking.probability, masking.mask, masking.random)))
        starts = None
        if len(rows.boundaries) > len(rows.ids) + 1:
            starts = np.zeros(rows.ids.shape, dtype=bool)
            starts.reshape(-1)[rows.boundaries[:-1]] = True
        targets, originals = self._masking.apply(rows.ids, self.keys(places), rates, starts)
        boundaries, longest = self._seen(rows, step)
        return Batch(rows.ids, originals, targets, boundaries, longest, places, rows.token_types, rows.pair_labels)

    def _seen(self, rows: Rows, step: int) -> tuple[NDArray[np.int32] | None, int]:
        """The boundaries that attention is to keep, and the longest document between them."""
        sequence = self.sequence_length
        stretch = stretch_length(self._style.curriculum, sequence, step)
        if self._style.document_attention and stretch == sequence:
            return rows.boundaries, int(np.diff(rows.boundaries).max())
        end = int(rows.boundaries[-1])
        begins = rows.boundaries[:-1]
        if not self._style.document_attention:
            begins = begins[(begins % sequence == 0) | rows.padded]
            if self.is_causal or not rows.padded.any():
                begins = begins[:0]  # nothing looks at what is behind it
        if stretch < sequence:
            windows = (np.arange(0, end, sequence)[:, None] + np.arange(0, sequence, stretch)).reshape(-1)
            begins = np.union1d(begins, windows)
        if not len(begins):
            return None, sequence
        boundaries = np.append(begins, end).astype(np.int32)
        return boundaries, int(np.diff(boundaries).max())


def stretch_length(curriculum: CurriculumSection, sequence_length: int, step: int) -> int:
    """Tokens that see each other at `step`: a straight line from `start_length` to the whole sample (the schedule of Li
    et al. 2022, "The stability-efficiency dilemma", section 4; there samples are cut off, here they are seen in
    stretches, so that no token is lost and a step has as many as ever)."""
    if curriculum.start_length is None or step >= curriculum.length_steps:
        return sequence_length
    grown = (sequence_length - curriculum.start_length) * step // curriculum.length_steps
    length = curriculum.start_length + grown
    return max(curriculum.start_length, length - length % curriculum.length_multiple)
