"""From texts to the rows of a batch, for any Hugging Face tokenizer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from pipeline.model import longest_input

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

_CHUNK = 4096
_MULTIPLE = 8  # of tokens, for matrix units


@dataclass(frozen=True)
class Sample:
    """One row. input_ids int32, token_types int8 [tokens]. target: what its head takes (pipeline.tasks.heads)."""

    input_ids: NDArray[np.int32]
    token_types: NDArray[np.int8]
    target: tuple[float, ...]


@dataclass(frozen=True)
class Rows:
    """A micro-batch on the device.

    inputs: the model's arguments [batch, sequence]. targets: float64 [batch, numbers of a target]. weights: float32
    [batch], 0 for rows that only fill the batch up, else 1.
    """

    inputs: "dict[str, torch.Tensor]"
    targets: "torch.Tensor"
    weights: "torch.Tensor"


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a model folder, able to pad, and to keep a pair's texts apart.

    A GPT's tokenizer has neither of its own: it pads with the end of a document, and between and behind the texts of a
    pair stands that token too (Radford et al. 2018, section 3.3). What comes of it is saved with the model, so that
    plain transformers gives the same ids. Raises UserError for a folder without a fast tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder} has no tokenizer ({str(error).strip().partition(chr(10))[0]})") from None
    if not tokenizer.is_fast:
        raise UserError(f"--model {folder} has no tokenizer.json; save its tokenizer anew with a fast class")
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(f"--model {folder}: the tokenizer has neither a pad_token nor an eos_token; name one of them")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Not by its special tokens: a GPT's tokenizer of ours has [CLS] and [SEP] for the BERT of the same shards.
    framed = tokenizer("a", "b", return_special_tokens_mask=True)["special_tokens_mask"][-1]
    if tokenizer.eos_token_id is not None and not framed:
        _separate_pairs(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


def _separate_pairs(tokenizer: "PreTrainedTokenizerFast") -> None:
    from tokenizers import processors

    end = str(tokenizer.eos_token)
    template = processors.TemplateProcessing(
        single="$A", pair=f"$A {end} $B:1 {end}:1", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = template if before is None else processors.Sequence([before, template])


def encode(
    tokenizer: "PreTrainedTokenizerFast",
    firsts: Sequence[str],
    seconds: Sequence[str] | None,
    targets: Sequence[tuple[float, ...]],
    max_length: int,
) -> list[Sample]:
    """A row a text or pair, the longer text of a pair being cut first (BERT's `_truncate_seq_pair`)."""
    found: list[Sample] = []
    for start in range(0, len(firsts), _CHUNK):
        chosen = slice(start, start + _CHUNK)
        encoded = tokenizer(
            list(firsts[chosen]),
            None if seconds is None else list(seconds[chosen]),
            truncation="longest_first",
            max_length=max_length,
            return_token_type_ids=True,
        )
        for ids, types, target in zip(encoded["input_ids"], encoded["token_type_ids"], targets[chosen], strict=True):
            found.append(Sample(np.array(ids, np.int32), np.array(types, np.int8), target))
    return found


class Collator:
    """Makes micro-batches for one model.

    It pads on the right, with token_type_ids where the model tells a pair's texts apart by them.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", config: "PretrainedConfig", device: "torch.device"
    ) -> None:
        self._padding = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        self._has_types = getattr(config, "type_vocab_size", 0) > 1
        self._limit = longest_input(config)
        self._device = device

    def __call__(self, samples: Sequence[Sample], weights: Sequence[float]) -> Rows:
        import torch

        longest = max(1, *(len(sample.input_ids) for sample in samples))
        length = -(-longest // _MULTIPLE) * _MULTIPLE
        length = max(longest, min(length, self._limit))
        shape = (len(samples), length)
        ids, types = np.full(shape, self._padding, np.int64), np.zeros(shape, np.int64)
        mask = np.zeros(shape, np.int64)
        for row, sample in enumerate(samples):
            tokens = len(sample.input_ids)
            ids[row, :tokens], types[row, :tokens], mask[row, :tokens] = sample.input_ids, sample.token_types, 1
        arrays: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": mask}
        if self._has_types:
            arrays["token_type_ids"] = types
        return Rows(
            {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()},
            torch.tensor([sample.target for sample in samples], dtype=torch.float64).to(self._device),
            torch.tensor(weights, dtype=torch.float32).to(self._device),
        )


def by_length(samples: Sequence[Sample], size: int) -> Iterator[list[int]]:
    """Numbers of all samples, `size` at a time (the last fewer), rows of like length together, the longest first."""
    order = sorted(range(len(samples)), key=lambda number: -len(samples[number].input_ids))
    for start in range(0, len(order), size):
        yield order[start : start + size]
