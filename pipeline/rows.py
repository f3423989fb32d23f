"""Rows of samples as the corpus has them: token ids, and where documents begin, before anything is masked or turned.

Rows of "concatenate" are stretches of the corpus; those of other packings are pieces of documents, each with its frame
([CLS] and [SEP] for masked LM), and padding behind them; those of pairs are [CLS] A [SEP] B [SEP].
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.encoding import SpecialTokens
from data_prep.errors import UserError
from data_prep.packing import PAIR_FRAME, frame_of
from data_prep.plan import Plan
from data_prep.randomness import UInt64, uniform
from data_prep.shards import ShardSet
from pipeline.order import Places
from pipeline.token_files import Stretch, TokenFiles

# First coordinates of what is drawn; see pipeline.samples for the others.
_PAIR, _OTHER = 3, 4
Keys = Callable[[], UInt64]

_TRIES = 8  # to find another document for next-sentence prediction


@dataclass(frozen=True)
class Corpus:
    """One shard set and its plan."""

    name: str
    shards: ShardSet
    plan: Plan

    @property
    def key(self) -> int:
        """A number of its own, by its name: its samples' order and masks do not change when other corpora join."""
        return int(hashlib.sha256(self.name.encode()).hexdigest()[:15], 16)


@dataclass(frozen=True)
class Pieces:
    """The stretches of tokens that rows are made of [pieces]. row: which; start, length: first token, counted over all
    of the corpus's, and how many; continues: whether it begins inside its document."""

    row: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    continues: NDArray[np.bool_]


@dataclass
class Rows:
    """Rows that are being made.

    ids: tokens [batch, sequence]; of objective causal, those to predict, for "concatenate" with the token before them
    [batch, sequence + 1]. boundaries: of document parts, as in Batch. first_ids: of objective causal without that
    token, what each part is begun with [parts]. padded: whether each part is padding [parts].
    """

    ids: NDArray[Any]
    boundaries: NDArray[np.int32]
    first_ids: NDArray[Any]
    padded: NDArray[np.bool_]
    token_types: NDArray[np.uint8] | None = None
    pair_labels: NDArray[np.int64] | None = None
    pieces: list[Pieces] = field(default_factory=list)


class _Source:
    """The samples of one split of one corpus, as stretches of its tokens."""

    def __init__(self, corpus: Corpus, split: str) -> None:
        self.settings = corpus.plan.settings
        self.files = TokenFiles(corpus.shards)
        side = corpus.plan.split(split)
        self.size = side.samples
        self._indexed = self.settings.packing != "concatenate"
        if self._indexed:
            self._first, self._pieces = corpus.plan.pieces(split)
        else:
            # The split as one stream: where each shard's part of it begins there, and among all of the set's tokens.
            self._stream = np.cumsum((0, *side.tokens))
            self._base = np.cumsum((0, *corpus.shards.tokens[:-1])) + side.first_token

    def pieces(self, samples: NDArray[np.int64]) -> Pieces:
        """What these samples are made of [batch], in order."""
        if self._indexed:
            first, end = self._first[samples], self._first[samples + 1]
            counts = end - first
            row = np.repeat(np.arange(len(samples)), counts)
            found = self._pieces[np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)]
            return Pieces(row, found["start"], found["length"].astype(np.int64), found["continues"] > 0)
        start = samples * self.settings.stride
        length = np.full(len(samples), self.settings.stride + (self.settings.objective == "causal"))
        row = np.arange(len(samples))
        done: list[tuple[NDArray[np.int64], ...]] = []
        while len(row):  # more than once where a stretch runs over the end of a shard
            shard = np.searchsorted(self._stream, start, side="right") - 1
            room = self._stream[shard + 1] - start
            over = length > room
            at = self._base[shard] + start - self._stream[shard]
            if not over.any():
                done.append((row, at, length))
                break
            take = np.minimum(length, room)
            done.append((row, at, take))
            row, start, length = row[over], (start + take)[over], (length - take)[over]
        if len(done) == 1:
            row, start, length = done[0]
        else:
            row, start, length = (np.concatenate(parts) for parts in zip(*done, strict=True))
            order = np.argsort(row, kind="stable")
            row, start, length = row[order], start[order], length[order]
        return Pieces(row, start, length, np.ones(len(row), dtype=bool))


class RowMaker:
    """Makes rows of the samples of one split over one or several corpora, which share a plan's settings.

    Raises UserError when the tokenizer lacks a token that the objective needs, or a shard is not what its manifest
    says.
    """

    def __init__(self, corpora: tuple[Corpus, ...], split: str, special: SpecialTokens) -> None:
        self._sources = [_Source(corpus, split) for corpus in corpora]
        self.sizes = tuple(source.size for source in self._sources)
        self.settings = corpora[0].plan.settings
        self.dtype = self._sources[0].files.dtype
        for corpus, source in zip(corpora, self._sources, strict=True):
            if source.files.dtype != self.dtype:
                raise UserError(
                    f"{corpora[0].shards.folder} holds {self.dtype.name}, {corpus.shards.folder}"
                    f" {source.files.dtype.name}: corpora of one run have one dtype; tokenize one of them again"
                )
        self._end = special.end_of_document
        self._padding = special.padding if special.padding is not None else special.end_of_document
        if self.settings.objective == "mlm":
            self._classification = _needed(special.classification, "classification ([CLS])")
            self._separator = _needed(special.separator, "separator ([SEP])")

    def rows(self, places: Places, keys: Keys) -> Rows:
        """The rows at these places. keys: gives a hash of each, for the draws of pairs [batch]."""
        if self.settings.packing == "concatenate":
            return self._stretches(places)
        if self.settings.is_pairs:
            return self._pairs(places, keys())
        return self._packed(places)

    def origins(self, places: Places, keys: Keys) -> list[list[Stretch]]:
        """The stretches of documents that each of these rows is made of, in order [batch]."""
        found: list[list[Stretch]] = [[] for _ in places.sample]
        for index, pieces in zip(np.unique(places.corpus), self.rows(places, keys).pieces, strict=True):
            files = self._sources[index].files
            for row, start, length in zip(pieces.row, pieces.start, pieces.length, strict=True):
                found[row] += files.documents(int(start), int(length))
        return found

    def _gather(self, places: Places) -> list[tuple[NDArray[np.int64], _Source, Pieces]]:
        """Of each corpus in the batch: its rows, and the pieces of their samples."""
        if len(self._sources) == 1:
            source = self._sources[0]
            return [(np.arange(len(places.sample)), source, source.pieces(places.sample))]
        found = []
        for index in np.unique(places.corpus):
            rows = np.flatnonzero(places.corpus == index)
            source = self._sources[index]
            found.append((rows, source, source.pieces(places.sample[rows])))
        return found

    def _stretches(self, places: Places) -> Rows:
        """Rows of "concatenate": the tokens as they follow on one another in the corpus."""
        causal = self.settings.objective == "causal"
        batch, sequence = len(places.sample), self.settings.sequence_length
        width = sequence + causal
        tokens = np.empty((batch, width), dtype=self.dtype)
        frame = frame_of(self.settings.objective) // 2
        pieces = []
        for rows, source, found in self._gather(places):
            found = replace(found, row=rows[found.row])
            position = found.row * width + frame
            if len(found.row) > len(rows):  # some run over the end of a shard
                before = np.cumsum(found.length) - found.length
                position += before - before[np.searchsorted(found.row, found.row)]
            source.files.read(found.start, found.length, tokens.reshape(-1), position)
            pieces.append(found)
        if causal:
            begins = tokens[:, :-1] == self._end
            begins[:, 0] = True
        else:
            tokens[:, 0], tokens[:, -1] = self._classification, self._separator
            ends = tokens == self._end
            tokens[ends] = self._separator
            begins = np.zeros_like(ends)
            begins[:, 0] = True
            begins[:, 1:] |= ends[:, :-1]
            begins[:, -1] = False  # the last separator belongs to what is before it
        first = np.flatnonzero(begins.reshape(-1))
        boundaries = np.append(first, batch * sequence).astype(np.int32)
        return Rows(tokens, boundaries, tokens[:0, 0], np.zeros(len(first), dtype=bool), pieces=pieces)

    def _packed(self, places: Places) -> Rows:
        """Rows of pieces of documents, each with its frame, and padding behind them."""
        frame = frame_of(self.settings.objective)
        batch, sequence = len(places.sample), self.settings.sequence_length
        ids = np.full((batch, sequence), self._padding, dtype=self.dtype)
        flat = ids.reshape(-1)
        used = np.zeros(batch, dtype=np.int64)
        firsts, first_ids, pieces = [], [], []
        for rows, source, found in self._gather(places):
            taken = found.length + frame
            before = np.cumsum(taken) - taken
            row = rows[found.row]
            first = row * sequence + before - before[np.searchsorted(found.row, found.row)]
            source.files.read(found.start, found.length, flat, first + frame // 2)
            if frame:
                flat[first], flat[first + taken - 1] = self._classification, self._separator
            else:
                begun_with = np.full(len(first), self._end, dtype=self.dtype)
                inside = np.flatnonzero(found.continues)
                source.files.read(found.start[inside] - 1, np.ones(len(inside), np.int64), begun_with, inside)
                first_ids.append(begun_with)
            used += np.bincount(row, weights=taken, minlength=batch).astype(np.int64)
            firsts.append(first)
            pieces.append(replace(found, row=row))
        if frame:
            ids[ids == self._end] = self._separator  # of shards of another program
        return self._with_padding(ids, np.concatenate(firsts), first_ids, used, pieces)

    def _with_padding(
        self,
        ids: NDArray[Any],
        first: NDArray[np.int64],
        first_ids: list[NDArray[Any]],
        used: NDArray[np.int64],
        pieces: list[Pieces],
    ) -> Rows:
        """Rows whose documents begin at `first`, and of which `used` positions are taken [batch]."""
        batch, sequence = ids.shape
        tails = np.flatnonzero(used < sequence)
        begins = np.concatenate((first, tails * sequence + used[tails]))
        order = np.argsort(begins)
        padded = np.concatenate((np.zeros(len(first), dtype=bool), np.ones(len(tails), dtype=bool)))[order]
        begun_with = np.concatenate((*first_ids, np.full(len(tails), self._end, dtype=self.dtype)))
        boundaries = np.append(begins[order], batch * sequence).astype(np.int32)
        return Rows(ids, boundaries, begun_with[order] if first_ids else begun_with[:0], padded, pieces=pieces)

    def _pairs(self, places: Places, keys: UInt64) -> Rows:
        """[CLS] A [SEP] B [SEP] of two stretches of one document, and padding. For nsp, B is another document's in half
        of the rows (Devlin et al. 2019, section 3.1, task 2); for sop, the two are turned around (Lan et al. 2020,
        section 3.1)."""
        batch, sequence = len(places.sample), self.settings.sequence_length
        ids = np.full((batch, sequence), self._padding, dtype=self.dtype)
        types = np.zeros((batch, sequence), dtype=np.uint8)
        labels = (uniform(_PAIR, keys) < 0.5).astype(np.int64)
        used = np.zeros(batch, dtype=np.int64)
        kept = []
        for rows, source, found in self._gather(places):
            start, length = found.start.reshape(-1, 2).copy(), found.length.reshape(-1, 2).copy()
            turned = labels[rows] > 0
            if self.settings.packing == "nsp":
                other = self._other_documents(source, places.sample[rows], start[:, 0], keys[rows], turned)
                turned = other >= 0
                labels[rows] = turned
                theirs = source.pieces(other[turned])
                start[turned, 1] = theirs.start[1::2]
                room = sequence - PAIR_FRAME - length[turned, 0]
                length[turned, 1] = np.minimum(theirs.length[1::2], room)
            else:
                start[turned], length[turned] = start[turned][:, ::-1], length[turned][:, ::-1]
            first = rows * sequence + 1
            second = first + length[:, 0] + 1
            position = np.stack((first, second), axis=1)
            source.files.read(start.reshape(-1), length.reshape(-1), ids.reshape(-1), position.reshape(-1))
            ids.reshape(-1)[np.concatenate((second - 1, second + length[:, 1]))] = self._separator
            used[rows] = length.sum(axis=1) + PAIR_FRAME
            column = np.arange(sequence)
            types[rows] = (column >= (length[:, 0] + 2)[:, None]) & (column < used[rows][:, None])
            kept.append(Pieces(rows[found.row], start.reshape(-1), length.reshape(-1), found.continues))
        ids[:, 0] = self._classification
        ids[ids == self._end] = self._separator
        made = self._with_padding(ids, np.arange(batch) * sequence, [], used, kept)
        made.token_types, made.pair_labels = types, labels
        return made

    def _other_documents(
        self,
        source: _Source,
        samples: NDArray[np.int64],
        start: NDArray[np.int64],
        keys: UInt64,
        wanted: NDArray[np.bool_],
    ) -> NDArray[np.int64]:
        """A random sample of another document for each row that wants one; -1 elsewhere, and where none was found."""
        other = np.full(len(samples), -1, dtype=np.int64)
        for row in np.flatnonzero(wanted):
            own = source.files.document_of(int(start[row]))
            drawn = (uniform(_OTHER, keys[row], np.arange(_TRIES)) * source.size).astype(np.int64)
            for candidate in drawn:
                first = source.pieces(np.array([candidate])).start[0]
                if source.files.document_of(int(first)) != own:
                    other[row] = candidate
                    break
        return other


def _needed(token: int | None, name: str) -> int:
    if token is None:
        raise UserError(f"data.tokenizer has no {name} token, which objective mlm needs")
    return token
