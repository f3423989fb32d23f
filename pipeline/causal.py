"""What may be done to causal samples: fill-in-the-middle to their tokens, goldfish drop to their loss.

Both work on a batch's labels [batch, sequence], the token that each position is to predict, in document parts: part i
is the stretch boundaries[i] to boundaries[i + 1] of the flattened labels. Parts are not empty, follow on one another
and do not run over the end of a row.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.encoding import TOKENIZER_FILE, tokenizer_files
from data_prep.errors import UserError
from data_prep.randomness import hash64, uniform

FEWEST_TEXT_TOKENS = 6
"""The shortest text that fill-in-the-middle takes: it keeps at least half of it, a token for each of three sections."""

_SENTINELS = 3
_IS_CHANGED, _IS_SPM, _FIRST_CUT, _SECOND_CUT = range(4)  # last coordinates of what is drawn for a part
_GOLDFISH = 1
# Steele & Vigna 2022, "Computationally easy, spectrally good multipliers for congruential pseudorandom number
# generators": of the longest period modulo 2^64.
_BASE = 0xD1342543DE82EF95


@dataclass(frozen=True)
class Sentinels:
    """Ids of the tokens that stand before the three sections of a text."""

    prefix: int
    middle: int
    suffix: int


def find_sentinels(tokenizer: Path, *, prefix: str, middle: str, suffix: str) -> Sentinels:
    """The ids of three tokens of a tokenizer folder, special ones or others of its vocabulary.

    Raises UserError when the folder has no tokenizer, lacks one of them, or two are the same.
    """
    import tokenizers

    tokenizer_files(tokenizer)  # refuses a folder without one
    ids: dict[str, int] = tokenizers.Tokenizer.from_file(str(tokenizer / TOKENIZER_FILE)).get_vocab()
    names = {"causal.fim_prefix": prefix, "causal.fim_middle": middle, "causal.fim_suffix": suffix}
    if missing := [f"{field} {name!r}" for field, name in names.items() if name not in ids]:
        raise UserError(
            f"{tokenizer / TOKENIZER_FILE} has no token {', '.join(missing)}: name tokens that it has, or train a"
            " tokenizer with them: python -m data_prep train_tokenizer ... --special_tokens"
            " '<|fim_prefix|>' '<|fim_middle|>' '<|fim_suffix|>'"
        )
    if len(set(names.values())) < _SENTINELS:
        given = ", ".join(f"{field} {name!r}" for field, name in names.items())
        raise UserError(f"{given}: expected three different tokens; give each section its own")
    return Sentinels(prefix=ids[prefix], middle=ids[middle], suffix=ids[suffix])


def fill_in_the_middle(
    labels: NDArray[Any],
    boundaries: NDArray[np.int32],
    keys: NDArray[np.uint64],
    eligible: NDArray[np.bool_],
    *,
    rate: float,
    spm_rate: float,
    sentinels: Sentinels,
    end_of_document: int,
) -> None:
    """Turns some parts' texts into prefix, suffix and middle, or suffix, prefix and middle, in place.

    After Bavarian et al. 2022, "Efficient training of language models to fill in the middle" (sections 3 and 4): at
    the level of the context, that is, of the parts of a sample, so that no sample begins or ends inside a changed text;
    jointly in both orders; SPM as in the second variant of appendix D, so that both begin with the same token:

        PSM  <prefix> prefix <suffix> suffix <middle> middle
        SPM  <prefix> <suffix> suffix <middle> prefix middle

    The two cuts fall between tokens, uniformly and independently, so any section may be empty. (The paper's cuts fall
    between characters, which takes the text and other numbers of tokens.)

    A part keeps its length: the last three tokens of its text make room for the sentinels before the cuts are drawn. So
    what is lost is the end of the suffix, where a text that the context cuts ends arbitrarily anyway. What is left is
    one stretch of text: the middle is whole and ends where the suffix begins. An end-of-document id that ends the part
    stays there and ends the middle. A text of fewer than `FEWEST_TEXT_TOKENS` stays as it is.

    labels: token ids [batch, sequence], C-contiguous.
    boundaries: of the parts [parts + 1]. eligible: the parts that may be changed, [parts]: those that are no padding.
    keys: of the rows [batch]; what happens to a part follows from its row's key and its number in the row alone.
    rate: probability that a part is changed. spm_rate: share of SPM among those.
    """
    assert labels.flags.c_contiguous  # what follows would change a copy
    flat = labels.reshape(-1)
    starts, ends = boundaries[:-1].astype(np.int64), boundaries[1:].astype(np.int64)
    rows = starts // labels.shape[1]
    part_keys = keys[rows], np.arange(len(starts)) - np.searchsorted(starts, rows * labels.shape[1])
    texts = ends - starts - (flat[ends - 1] == end_of_document)
    kept = texts - _SENTINELS
    is_changed = eligible & (texts >= FEWEST_TEXT_TOKENS) & (uniform(*part_keys, _IS_CHANGED) < rate)
    is_spm = uniform(*part_keys, _IS_SPM) < spm_rate
    cuts = [(uniform(*part_keys, cut) * (kept + 1)).astype(np.int64) for cut in (_FIRST_CUT, _SECOND_CUT)]

    before_prefix, before_middle, before_suffix = (
        np.array([token], dtype=labels.dtype) for token in (sentinels.prefix, sentinels.middle, sentinels.suffix)
    )
    columns = (starts, kept, np.minimum(*cuts), np.maximum(*cuts), is_spm)
    for start, length, first, second, spm in zip(*(column[is_changed].tolist() for column in columns), strict=True):
        text = flat[start : start + length]
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        if spm:
            order = before_prefix, before_suffix, suffix, before_middle, prefix, middle
        else:
            order = before_prefix, prefix, before_suffix, suffix, before_middle, middle
        flat[start : start + length + _SENTINELS] = np.concatenate(order)


def goldfish(labels: NDArray[Any], boundaries: NDArray[np.int32], *, k: int, context: int) -> NDArray[np.bool_]:
    """True where a label is left out of the loss: one in k, always the same ones of the same text [batch, sequence].

    Hans et al. 2024, "Be like a goldfish, don't memorize!" (section 3), with its hashed mask: a label is left out where
    a hash of the `context` labels before it is below 1/k of its range (the paper has context = 13, k from 3 on). So a
    passage, wherever it is repeated, misses the same tokens from its token `context` on (from 0).

    Exactly: before label p of a part stand its labels p - context to p - 1, not p itself; so says the paper, while its
    released code takes p - context + 1 to p. They are hashed in their order (that code multiplies them, so their order
    does not count, and one id 0 decides). The first `context` labels of a part have fewer before them and are kept, as
    in that code, where a row is the part. An end-of-document id is a label like any other; the given first input of a
    part is none.

    labels: token ids [batch, sequence] of any integer type. boundaries: of the parts [parts + 1].
    """
    sequence = labels.shape[1]
    dropped = np.zeros(labels.shape, dtype=np.bool_)
    if sequence <= context:
        return dropped
    # A polynomial modulo 2^64 in _BASE, as the difference of two prefix sums; the arithmetic is exact, so dividing by
    # _BASE^position leaves nothing of the position.
    powers = np.cumprod(np.full(sequence, _BASE, dtype=np.uint64))
    sums = np.zeros((labels.shape[0], sequence), dtype=np.uint64)
    np.cumsum(labels[:, :-1].astype(np.uint64) * powers[:-1], axis=1, out=sums[:, 1:])
    inverse = np.cumprod(np.full(sequence - context, pow(_BASE, -1, 1 << 64), dtype=np.uint64))
    windows = (sums[:, context:] - sums[:, :-context]) * inverse
    dropped[:, context:] = hash64(_GOLDFISH, windows) < np.uint64((1 << 64) // k)

    first = boundaries[:-1, None] + np.arange(context)
    dropped.reshape(-1)[first[first < boundaries[1:, None]]] = False
    return dropped
