"""Whether a fast encoder gives the reference's ids: on nasty strings and the corpus's first megabyte before a job, and
on a seeded sample of documents during it.

Equality is by value, id by id. A document whose ids differ is shown with the first place where they do.
"""

import itertools
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import fast_encoders
from data_prep.encoding import Encoded, Encoder, utf8
from data_prep.randomness import hash64

CHECK_SEED = 20_240_229
# One document in 2,048: the reference takes 1 s for 4 or 5 MB, a fast encoder and all around it for up to 150 MB a
# core, so this costs at most 2 % of the time. 100 GB of text have some 10,000 documents of it checked.
CHECKED_DOCUMENT_IN = 2048


@dataclass(frozen=True)
class Checked:
    """How much of an encoder's output was compared with the reference."""

    documents: int = 0
    tokens: int = 0

    def __add__(self, other: "Checked") -> "Checked":
        return Checked(self.documents + other.documents, self.tokens + other.tokens)


@dataclass(frozen=True)
class Proof:
    """Whether a fast encoder may be used.

    checked: what was compared. fault: why it may not, or empty.
    """

    checked: Checked
    fault: str


def prove(name: str, folder: Path, fingerprint: str, texts: Sequence[str]) -> Proof:
    """Compares the encoder `name` of the tokenizer in `folder` with the reference on `nasty_texts` and on `texts`.

    texts: the beginning of the corpus.
    """
    try:
        encoder = fast_encoders.load_encoder(name, folder, fingerprint)
        reference = Encoder(folder)
        checked_texts = [*nasty_texts(reference.special_tokens()), *texts]
        encoded = utf8(checked_texts)
        found = encoder.encode_flat(checked_texts, encoded)
    except Exception as error:  # of any library, for any reason: the reference stays
        return Proof(Checked(), f"{name} does not take it ({' '.join(str(error).split())[:200]})")
    expected = reference.encode_flat(checked_texts, encoded)
    difference = first_difference(expected, found)
    checked = Checked(len(checked_texts), len(expected.ids))
    if difference is None:
        return Proof(checked, "")
    text = checked_texts[difference[0]]
    return Proof(
        checked,
        f"{name} {encoder.version} gives another id at token {difference[1]} of {text[:40]!r} ({len(text)} characters)",
    )


def first_difference(expected: Encoded, found: Encoded) -> tuple[int, int] | None:
    """(document, token within it) of the first differing id, or None where all are equal."""
    if len(expected.ids) == len(found.ids) and np.array_equal(expected.lengths, found.lengths):
        different = np.flatnonzero(expected.ids != found.ids)
        if not len(different):
            return None
        ends = np.cumsum(expected.lengths)
        document = int(np.searchsorted(ends, different[0], side="right"))
        return document, int(different[0] - (ends[document] - expected.lengths[document]))
    if len(expected.lengths) != len(found.lengths):
        return min(len(expected.lengths), len(found.lengths)), 0
    document = int(np.flatnonzero(expected.lengths != found.lengths)[0])
    for earlier in range(document + 1):
        ours, theirs = expected.document(earlier), found.document(earlier)
        shorter = min(len(ours), len(theirs))
        different = np.flatnonzero(ours[:shorter] != theirs[:shorter])
        if len(different) or len(ours) != len(theirs):
            return earlier, int(different[0]) if len(different) else shorter
    raise AssertionError("unreachable: the lengths differ")


class SampleCheck:
    """Compares a fast encoder with the reference on a sample of one part's documents, the same whoever encodes it."""

    def __init__(self, reference: Encoder, part_number: int, one_in: int = CHECKED_DOCUMENT_IN) -> None:
        self.checked = Checked()
        self._reference, self._part, self._one_in = reference, part_number, one_in
        self._documents = 0

    def __call__(self, texts: list[str], encoded: list[bytes], found: Encoded) -> tuple[int, int] | None:
        """(document of the batch, token within it) of a differing id in the sample, or None."""
        numbers = np.arange(self._documents, self._documents + len(texts))
        self._documents += len(texts)
        drawn = np.flatnonzero(hash64(CHECK_SEED, self._part, numbers) % np.uint64(self._one_in) == 0)
        if not len(drawn):
            return None
        ends = np.cumsum(found.lengths)
        expected = self._reference.encode_flat([texts[i] for i in drawn], [encoded[i] for i in drawn])
        slices = [found.ids[ends[i] - found.lengths[i] : ends[i]] for i in drawn]
        difference = first_difference(expected, Encoded(np.concatenate(slices), found.lengths[drawn]))
        self.checked += Checked(len(drawn), len(expected.ids))
        return None if difference is None else (int(drawn[difference[0]]), difference[1])


def nasty_texts(special_tokens: Sequence[str] = ()) -> list[str]:
    """Strings on which encoders differ: fixed, but for the look-alikes of a tokenizer's own special tokens."""
    look_alikes = ["[MASK]", "[CLS]", "[SEP]", "[PAD]", "[UNK]", "<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>"]
    look_alikes += ["<0x41>", "<0x0A>", "<|im_start|>", *special_tokens]
    cases: list[str] = [
        "",
        " ",
        "\n",
        "\t",
        "  leading and trailing   ",
        "tabs\tand\t\tmore\t",
        "a\r\nb\rc\n\n\n\n d\x0b\x0c\x85\u2028\u2029e",
        "\x00",
        "a\x00b\x01\x1f\x7f\x9f",
        "it's I'll we've CAN'T don\u2019t x'S 'tis ''",
        "emoji \U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466\U0001f3f3\ufe0f\u200d\U0001f308 ",
        "thumbs \U0001f44d\U0001f3fd",
        "flags \U0001f1eb\U0001f1f7\U0001f1ef\U0001f1f5 keycap 1\ufe0f\u20e3",
        "combining e\u0301\u0323 \u00e9 \u00c5 A\u030a \u0301alone \u1e9b\u0323 \ufb01 \u2460 \u00bd \u00b2",
        "e" + "\u0301" * 300 + " zalgo",
        "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3001\u4e2d\u6587\u5b57\u7b26 ",
        "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab \u0e44\u0e17\u0e22\u0e04\u0e33 \u0915\u094d\u0937\u093f",
        "\u05e2\u05d1\u05e8\u05d9\u05ea \u0648\u0639\u0631\u0628\u064a \u202eabc\u202c \u200f\u200e \u0661\u0662\u0663",
        "\u0130stanbul \u0131 \u1e9e Stra\u00dfe \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2",
        "\u01c5 \u1f88 \ufb03 \u0149",
        "1234567890 3.14159e-10 1,000,000 0x1F 12 123 1234 12345",
        "x" + "\u3000\u00a0\u200b\ufeff\u00ad\u2003\u180e\u1680" * 3 + "y",
        "\ufffd\ufffe\uffff\U0010ffff\ue000\u2585 \u2581 \u2581\u2581a\u2581",
        "def f(self):\n        return [MASK]\n\tif x:\n\n\n    pass   \n",
        "https://example.org/a_b-c?d=e&f=%20#g user@example.org C:\\dir\\file.txt",
        "THE the The tHE camelCase snake_case kebab-case ALLCAPS123abc",
        "a" * 5000,
        "ab" * 3000,
        "aba" * 1000 + "abaab" * 500,
        "A" * 99 + " " + "A" * 100 + " " + "A" * 101 + " " + "\u00e9" * 101,
        " " * 4097,
        " \n" * 1500,
        "\n" * 300 + "x" + "\t" * 300,
        "#" * 777 + " " + "=" * 333 + "-" * 1001,
        "0" * 500,
        "\u4e2d" * 3000,
        "\U0001f600" * 1000,
        " ".join(look_alikes),
        "".join(look_alikes),
        *look_alikes,
        *(f"a{token}b {token.lower()} {token[:-1]}" for token in look_alikes),
    ]
    # Every general category: its first, last and some characters between, alone, among letters, doubled and in a row.
    for characters in _by_category().values():
        cases.append("".join(f"{c} a{c}b {c}{c} 1{c}2 A{c}." for c in characters))
        cases.append("".join(characters))
        cases.append(" ".join(characters))
    return cases


def _by_category(count: int = 24) -> dict[str, list[str]]:
    """Up to `count` characters of every Unicode general category but lone surrogates, spread over its range."""
    found: dict[str, list[str]] = {}
    # Every plane's beginning and a stride through the rest: all 1.1 million code points would take half a second.
    codes = itertools.chain(range(0x3400), range(0x3400, 0x20000, 7), range(0x20000, sys.maxunicode + 1, 4099))
    for code in codes:
        category = unicodedata.category(chr(code))
        if category != "Cs":
            found.setdefault(category, []).append(chr(code))
    return {
        category: [all_of[i] for i in np.unique(np.linspace(0, len(all_of) - 1, count).astype(int))]
        for category, all_of in sorted(found.items())
    }
