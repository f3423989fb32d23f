"""What of two texts is compared: hashes of the normalized text, MinHash bands of its word n-grams (`native/minhash.c`).

MinHash: Broder 1997, "On the resemblance and containment of documents". Bands: Leskovec, Rajaraman, Ullman, "Mining of
Massive Datasets", section 3.4. The defaults (5-grams, 14 bands of 8 rows) are FineWeb's.
"""

import ctypes
import functools
import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep import native

_SEED = 20_241_110
_STEPS = 1000  # of the integrals over the similarity, as in datasketch
MAX_NGRAM = 64


@dataclass(frozen=True)
class MinHashOptions:
    """ngram: words of an n-gram. Two documents match where all `rows` minima of at least one of `bands` are equal."""

    ngram: int = 5
    bands: int = 14
    rows: int = 8

    @property
    def permutations(self) -> int:
        return self.bands * self.rows

    @property
    def threshold(self) -> float:
        """The Jaccard similarity near which the probability of a match rises most steeply."""
        return float((1 / self.bands) ** (1 / self.rows))

    def probability(self, similarity: float) -> float:
        """Of a match between two documents whose n-gram sets have this Jaccard similarity."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)


def options_for(threshold: float, permutations: int, ngram: int) -> MinHashOptions:
    """The bands and rows, of at most `permutations` hashes, that err least about `threshold`.

    Least sum of the areas of false positives, below the threshold, and false negatives, above it, both over uniform
    similarity (Zhu et al. 2016, "LSH Ensemble", section 5; as datasketch does). Of equals the one with fewest bands.
    """
    similarity = (np.arange(_STEPS) + 0.5) / _STEPS
    below = similarity < threshold
    best = (np.inf, 0, 0)
    for bands in range(1, permutations + 1):
        for rows in range(1, permutations // bands + 1):
            matched = 1 - (1 - similarity**rows) ** bands
            best = min(best, (float(matched[below].sum() + (1 - matched[~below]).sum()), bands, rows))
    return MinHashOptions(ngram, best[1], best[2])


@dataclass(frozen=True)
class Signatures:
    """Of some documents: band_hashes [documents, bands] uint64; sketches [documents, bytes] uint8, one bit of each
    minimum; ngrams [documents], 0 where a text has fewer words than an n-gram: the rest of it then means nothing.
    """

    band_hashes: "np.ndarray[Any, np.dtype[np.uint64]]"
    sketches: "np.ndarray[Any, np.dtype[np.uint8]]"
    ngrams: "np.ndarray[Any, np.dtype[np.int64]]"


class Texts:
    """Texts as kernels take them: one buffer of UTF-8 and the texts' offsets in it [documents + 1]."""

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [text.encode() for text in texts]
        self.buffer = b"".join(encoded)
        self.offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(text) for text in encoded], out=self.offsets[1:])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        return self.buffer, pointer(self.offsets), ctypes.c_int64(len(self))


def pointer(array: "np.ndarray[Any, Any]") -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


@functools.cache
def kernel() -> ctypes.CDLL:
    library = native.load("minhash")
    for name in ("ngram_hashes", "list_duplicates"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def composed(texts: Sequence[str]) -> list[str]:
    """The texts in Unicode's canonical composition (NFC), so that equal characters are equal code points."""
    return [text if text.isascii() else unicodedata.normalize("NFC", text) for text in texts]


def exact_hashes(texts: Texts) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    """128 bits of each normalized text [documents, 2]: XXH3 of `normalized`."""
    import xxhash

    buffer, bounds = normalized(texts)
    view = buffer.data
    digests = [xxhash.xxh3_128_digest(view[start:end]) for start, end in itertools.pairwise(bounds.tolist())]
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2)


def normalized(texts: Texts) -> tuple["np.ndarray[Any, np.dtype[np.uint8]]", "np.ndarray[Any, np.dtype[np.int64]]"]:
    """UTF-8 in lower case, every run of white space one space, none at the ends; (buffer, offsets [documents + 1])."""
    out = np.empty(2 * len(texts.buffer), np.uint8)
    offsets = np.empty(len(texts) + 1, np.int64)
    kernel().normalize(*texts.arguments, pointer(out), pointer(offsets))
    return out, offsets


def signatures(texts: Texts, options: MinHashOptions) -> Signatures:
    multipliers, increments = _permutations(options.permutations)
    result = Signatures(
        np.empty((len(texts), options.bands), np.uint64),
        np.empty((len(texts), (options.permutations + 7) // 8), np.uint8),
        np.empty(len(texts), np.int64),
    )
    failed = kernel().minhash(
        *texts.arguments,
        ctypes.c_int64(options.ngram),
        ctypes.c_int64(options.bands),
        ctypes.c_int64(options.rows),
        pointer(multipliers),
        pointer(increments),
        pointer(result.band_hashes),
        pointer(result.sketches),
        pointer(result.ngrams),
    )
    if failed:
        raise MemoryError("minhash")
    return result


@functools.cache
def _permutations(count: int) -> tuple["np.ndarray[Any, np.dtype[np.uint64]]", "np.ndarray[Any, np.dtype[np.uint64]]"]:
    """Multipliers and increments [count] of the hash functions, the same in every process."""
    generator = np.random.Generator(np.random.PCG64(_SEED))
    drawn = generator.integers(0, 1 << 64, size=(2, count), dtype=np.uint64)
    return drawn[0].copy(), drawn[1].copy()


def estimated_similarity(a: "np.ndarray[Any, Any]", b: "np.ndarray[Any, Any]", permutations: int) -> float:
    """Jaccard similarity from one bit of each minimum (Li and König 2010, "b-Bit Minwise Hashing", b = 1).

    Bits are equal with probability (1 + J) / 2; the standard error is sqrt((1 - J^2) / permutations).
    """
    different = int(np.unpackbits(a ^ b).sum())
    return max(0.0, 1 - 2 * different / permutations)
