"""Packing: which stretches of documents make up each sample, for a run of documents at a time.

A sample is a list of pieces, stretches of tokens of one document each. A causal piece takes one position a token; a
masked-LM piece stands between [CLS] and [SEP], so it takes two more; the two pieces of a pair share three. Memory and
time are linear in the documents given, so a corpus of any size is packed window by window.
"""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import native
from data_prep.sentences import Sentences

PIECE = np.dtype([("start", "<i8"), ("length", "<i4"), ("continues", "<i4")])
"""A stretch of tokens: its first one, how many, and 1 where it begins inside its document."""
FRAME = 2
"""Positions beside its tokens that a masked-LM piece takes: [CLS] and [SEP]."""
PAIR_FRAME = 3
"""Positions beside the tokens of a pair: [CLS] A [SEP] B [SEP]."""
PACKINGS = {
    "causal": ("concatenate", "best_fit", "document"),
    "mlm": ("concatenate", "best_fit", "document", "full_sentences", "nsp", "sop"),
}
OF_SENTENCES = ("full_sentences", "nsp", "sop")
PAIRS = ("nsp", "sop")


def frame_of(objective: str) -> int:
    """Positions that each piece takes beside its tokens."""
    return FRAME if objective == "mlm" else 0


def whole_documents(
    begin: NDArray[np.int64], end: NDArray[np.int64], capacity: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """A piece a document; one longer than `capacity` tokens gives several, all full but the last.

    begin, end: tokens [begin, end) of each document [documents]. Returns the pieces [pieces] and how many each sample
    has, one [samples].
    """
    pieces = _cut(begin, end, capacity)
    return pieces, np.ones(len(pieces), dtype=np.int64)


def best_fit(
    begin: NDArray[np.int64], end: NDArray[np.int64], positions: int, frame: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Best-fit-decreasing packing of documents (Ding et al. 2024, "Fewer Truncations Improve Language Modeling",
    section 3): only one that is longer than a sample is cut, into full pieces and a rest.

    As `whole_documents`; a sample's pieces stand in the order of the corpus.
    """
    pieces = _cut(begin, end, positions - frame)
    sizes = np.ascontiguousarray(pieces["length"] + frame, dtype=np.int32)
    bins = np.empty(len(pieces), dtype=np.int64)
    function = native.load("packing").best_fit
    function.restype = ctypes.c_int64
    count = function(_pointer(sizes), ctypes.c_int64(len(sizes)), ctypes.c_int32(positions), _pointer(bins))
    if count < 0:
        raise MemoryError
    return pieces[np.argsort(bins, kind="stable")], np.bincount(bins, minlength=count)


def sentences(
    begin: NDArray[np.int64],
    end: NDArray[np.int64],
    found: Sentences,
    first_document: int,
    *,
    positions: int,
    pairs: bool,
    short_seq_prob: float,
    key: int,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Samples of whole sentences: as many as fit, over the ends of documents; with `pairs`, two stretches of one
    document, cut at a random sentence.

    With probability `short_seq_prob` a sample is meant to be shorter, of a length drawn evenly (Devlin et al. 2019,
    released code). As `whole_documents`; found: sentences of the shard, whose document `first_document` is the first
    given. key: of the random numbers.
    """
    documents = len(begin)
    first = np.ascontiguousarray(found.first[first_document : first_document + documents + 1])
    common: list[Any] = [
        _pointer(first),
        _pointer(found.starts),
        _pointer(np.ascontiguousarray(begin)),
        _pointer(np.ascontiguousarray(end)),
        ctypes.c_int64(documents),
    ]
    drawn = [ctypes.c_uint64(key), ctypes.c_uint64(round(short_seq_prob * 2**32))]
    counts = np.zeros(2, dtype=np.int64)
    library = native.load("packing")
    if pairs:
        common += [ctypes.c_int64(positions - PAIR_FRAME), *drawn]
        library.sentence_pairs(*common, None, None, _pointer(counts))
        counts[1] = 2 * counts[0]
    else:
        common += [ctypes.c_int64(positions), ctypes.c_int64(FRAME), *drawn]
        library.full_sentences(*common, None, None, None, _pointer(counts))
    starts = np.empty(counts[1], dtype=np.int64)
    lengths = np.empty(counts[1], dtype=np.int32)
    if pairs:
        pieces_of = np.full(counts[0], 2, dtype=np.int32)
        library.sentence_pairs(*common, _pointer(starts), _pointer(lengths), _pointer(counts))
    else:
        pieces_of = np.empty(counts[0], dtype=np.int32)
        library.full_sentences(*common, _pointer(starts), _pointer(lengths), _pointer(pieces_of), _pointer(counts))
    pieces = np.empty(len(starts), dtype=PIECE)
    pieces["start"], pieces["length"] = starts, lengths
    pieces["continues"] = ~np.isin(starts, begin, assume_unique=True)
    return pieces, pieces_of.astype(np.int64)


def blend_period(shares: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The order in which the components of a blend take turns, such that after every place each has had its share of
    the places so far to within one.

    shares: places of each component in the period [components]. Returns the component at each place and how many of
    that component's places came before it [period].
    """
    shares = np.ascontiguousarray(shares, dtype=np.int64)
    period = int(shares.sum())
    component, rank = np.empty(period, dtype=np.int32), np.empty(period, dtype=np.int32)
    native.load("packing").blend(
        _pointer(shares), ctypes.c_int64(len(shares)), ctypes.c_int64(period), _pointer(component), _pointer(rank)
    )
    return component, rank


def _cut(begin: NDArray[np.int64], end: NDArray[np.int64], capacity: int) -> NDArray[Any]:
    """Each document as pieces of at most `capacity` tokens, all full but the last; none of an empty one."""
    lengths = end - begin
    counts = -(-lengths // capacity)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces = np.empty(len(number), dtype=PIECE)
    pieces["start"] = np.repeat(begin, counts) + number * capacity
    pieces["length"] = np.minimum(np.repeat(lengths, counts) - number * capacity, capacity)
    pieces["continues"] = number > 0
    return pieces


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)
