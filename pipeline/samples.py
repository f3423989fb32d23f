"""Samples: what the model sees at sample number n of a run, as a pure function of (plan, seed, n).

A run consumes samples 0, 1, 2, ...; number n is the n-th of an order in which every epoch is another permutation of
the split. Ranks, micro-batches, workers and interruptions do not enter.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.encoding import SpecialTokens
from data_prep.errors import UserError
from data_prep.pack import Plan
from data_prep.randomness import hash64, permute, uniform
from data_prep.shards import Shard, ShardSet
from pipeline.recipe import MaskingSection

IGNORED = -100
"""Label of a position that is no target (torch.nn.functional.cross_entropy's default ignore_index)."""

# First coordinates of what is drawn, so that no two purposes share random numbers.
_ORDER, _CHOICE, _ACTION, _REPLACEMENT = 1, 2, 3, 4
_SPLITS = {"train": 0, "validation": 1}


@dataclass(frozen=True)
class Batch:
    """input_ids, labels: int64 [batch, sequence]; the labels are aligned with the logits: position i of the output
    is to predict labels[i]. targets: positions in the flattened labels that are not IGNORED, int64 [targets]."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]

    @functools.cached_property
    def targets(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.labels != IGNORED)


class Samples:
    """The samples of one split of a shard set.

    Raises UserError when the tokenizer lacks a token that masking needs, or a shard is not what its manifest says.
    """

    def __init__(
        self,
        shards: ShardSet,
        plan: Plan,
        split: str,
        *,
        seed: int,
        special: SpecialTokens,
        masking: MaskingSection | None = None,
    ) -> None:
        side = plan.train if split == "train" else plan.validation
        self.size = side.samples
        self._plan, self._seed = plan, seed
        self._split = _SPLITS[split]
        self._mapped: dict[int, Shard] = {}
        self._shards = shards
        self._first_token = side.first_token
        self._bounds = np.cumsum((0, *side.tokens))
        if plan.objective == "mlm":
            assert masking is not None
            self._masking = masking
            self._classification = _needed(special.classification, "classification ([CLS])")
            self._separator = _needed(special.separator, "separator ([SEP])")
            self._mask = _needed(special.mask, "mask ([MASK])")
            ids = [token for token in vars(special).values() if token is not None]
            assert shards.vocab_size is not None  # shards of another program have taken the tokenizer's
            self._is_special = np.zeros(shards.vocab_size, dtype=bool)
            self._is_special[ids] = True
            self._ordinary = np.flatnonzero(~self._is_special)

    def _tokens(self, index: int) -> NDArray[Any]:
        if index not in self._mapped:
            self._mapped[index] = self._shards.shard(index)
        return self._mapped[index].tokens

    def stream(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens [start, start + count) of the split, over the ends of shards."""
        out = np.empty(count, dtype=np.int64)
        done = 0
        index = int(np.searchsorted(self._bounds, start, side="right")) - 1
        while done < count:
            inside = start + done - int(self._bounds[index])
            take = min(count - done, int(self._bounds[index + 1] - self._bounds[index]) - inside)
            if take > 0:
                first = self._first_token[index] + inside
                out[done : done + take] = self._tokens(index)[first : first + take]
                done += take
            index += 1
        return out

    def place(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(epoch, sample of the split) of consumed sample numbers [batch]."""
        epochs, positions = np.divmod(numbers, self.size)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = permute(positions[chosen], self.size, _ORDER, self._seed, self._split, int(epoch))
        return epochs, samples

    def batch(self, numbers: NDArray[np.int64]) -> Batch:
        """The samples with these numbers [batch]; a negative number gives a row without targets."""
        numbers = np.asarray(numbers, dtype=np.int64)
        real = numbers >= 0
        epochs, samples = self.place(np.where(real, numbers, 0))
        make = self._causal if self._plan.objective == "causal" else self._masked
        batch = make(epochs, samples)
        batch.labels[~real] = IGNORED
        return batch

    def _rows(self, samples: NDArray[np.int64], width: int) -> NDArray[np.int64]:
        return np.stack([self.stream(int(sample) * self._plan.stride, width) for sample in samples])

    def _causal(self, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> Batch:
        rows = self._rows(samples, self._plan.sequence_length + 1)
        return Batch(np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:]))

    def _masked(self, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> Batch:
        """BERT's masking (Devlin et al. 2019, section 3.1), drawn anew each epoch (RoBERTa's dynamic masking, Liu et
        al. 2019, section 4.1); the ends of documents inside become separators (its FULL-SENTENCES format)."""
        text = self._rows(samples, self._plan.stride)
        text[text == self._shards.end_of_document] = self._separator
        ids = np.pad(text, ((0, 0), (1, 1)))
        ids[:, 0], ids[:, -1] = self._classification, self._separator
        position = np.arange(ids.shape[1])[None, :]
        where = (self._seed, self._split, epochs[:, None], samples[:, None], position)
        chosen = (uniform(_CHOICE, *where) < self._masking.probability) & ~self._is_special[ids]
        action = uniform(_ACTION, *where)
        replaced = chosen & (action < self._masking.mask)
        randomised = chosen & ~replaced & (action < self._masking.mask + self._masking.random)
        other = self._ordinary[(hash64(_REPLACEMENT, *where) % np.uint64(len(self._ordinary))).astype(np.int64)]
        labels = np.where(chosen, ids, IGNORED)
        ids[replaced] = self._mask
        ids[randomised] = other[randomised]
        return Batch(ids, labels)


def _needed(token: int | None, name: str) -> int:
    if token is None:
        raise UserError(f"data.tokenizer has no {name} token, which objective mlm needs")
    return token
