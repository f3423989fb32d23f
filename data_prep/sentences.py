"""Sentence starts of tokenized documents: found in the text, kept beside the shards as token positions.

A sentence ends behind a run of . ! ? … (or Arabic ؟ ۔, danda, ideographic and full-width 。 ！ ？ ．) and whatever
quotes and brackets close there, when white space follows and then something that is not a lower-case letter; behind
an ideographic or full-width one no white space is needed. A single full stop does not end one behind a title or the
like ("Dr.", "e.g.", "vs."), an initial ("J. Smith"), an abbreviation before a number ("Fig. 3"), or a number that
begins a line ("2. Methods"). A blank line always ends one. White space between two sentences belongs to the second.

The ids are those of the whole document; a sentence starts at the first token that begins at or after its start in the
text, so that " The" is the next sentence's and ".\\n", where that is one token, the last one's. Where tokens begin
follows from what each id stands for: bytes for byte-level and sentencepiece vocabularies, characters other than white
space for WordPiece. For every document these must add up to its text; where they do not, the reference encoder's own
offsets are taken, which is slow.

`NNNNNN.sentences`, little-endian:
    8 bytes   magic b"SENTSTRT"
    uint64    version, 1
    uint64    number of documents
    uint64    number of sentences
    int64[]   index of each document's first sentence, and the end [documents + 1]
    int32[]   first token of each sentence, counted from its document's first token [sentences]
Every document has at least one sentence, which starts at token 0. The id that ends a document belongs to its last.
"""

import ctypes
import hashlib
import json
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import durable, native
from data_prep.encoding import TOKENIZER_FILE, Encoded, Encoder, vocabulary_of
from data_prep.errors import UserError
from data_prep.manifest import FileRecord

SUFFIX = ".sentences"
_MAGIC = b"SENTSTRT"
_VERSION = 1
_HEADER = struct.Struct("<8sQQQ")
_SPACE = "\u2581"  # sentencepiece's mark for a space


@dataclass(frozen=True)
class Text:
    """The UTF-8 data of some documents, one after the other, and where each begins, and the end [documents + 1]."""

    data: bytes
    offsets: NDArray[np.int64]

    @staticmethod
    def of(encoded: list[bytes]) -> "Text":
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)), out=offsets[1:])
        return Text(b"".join(encoded), offsets)


def sentence_starts(text: Text) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Where sentences but the first of each document begin.

    Returns the index of each document's first start, and the end [documents + 1], and the starts in bytes from the
    beginning of the document [starts].
    """
    documents = len(text.offsets) - 1
    first = np.zeros(documents + 1, dtype=np.int64)
    starts = np.empty(len(text.data) // 2 + 1, dtype=np.int32)
    native.load("sentences").sentence_starts(
        text.data, _pointer(text.offsets), ctypes.c_int64(documents), _pointer(first), _pointer(starts)
    )
    return first, starts[: first[-1]].copy()


@dataclass(frozen=True)
class PieceSizes:
    """What each id of a vocabulary stands for.

    unit: "bytes" or, for WordPiece, "characters" other than white space. sizes: of each id; -1 where it has none, 0
    for WordPiece's unknown token [vocabulary]. prefix: whether a space may be put before a text. strips: whether
    marks (accents) are dropped.
    """

    unit: str
    sizes: NDArray[np.int32]
    prefix: bool = False
    strips: bool = False

    @staticmethod
    def of(folder: Path) -> "PieceSizes | None":
        """Of the tokenizer in `folder`; None where it is of a kind whose pieces do not tell."""
        raw = json.loads((folder / TOKENIZER_FILE).read_bytes())
        model = raw["model"]
        pieces = vocabulary_of(raw)
        unknown = model.get("unk_token")
        if "unk_id" in model and model["unk_id"] is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        parts = json.dumps([raw.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")])
        added = [token for token in raw.get("added_tokens", ()) if not token["special"]]
        size = max([*pieces.values(), *(token["id"] for token in added)], default=-1) + 1
        sizes = np.full(size, -1, dtype=np.int32)
        if model["type"] == "WordPiece":
            prefix = model["continuing_subword_prefix"]
            for piece, number in pieces.items():
                sizes[number] = len(piece.removeprefix(prefix)) if piece != prefix else len(piece)
            sizes[pieces[unknown]] = 0
            normalizer = raw.get("normalizer") or {}
            strips = normalizer.get("strip_accents")
            strips = normalizer.get("lowercase", False) if strips is None else strips
            return PieceSizes("characters", sizes, strips=bool(strips))
        for token in added:
            sizes[token["id"]] = len(token["content"].encode())
        if '"ByteLevel"' in parts:
            for piece, number in pieces.items():
                sizes[number] = len(piece)  # a character stands for a byte
        elif _SPACE in json.dumps(raw.get("decoder"), ensure_ascii=False):
            for piece, number in pieces.items():
                sizes[number] = len(piece.replace(_SPACE, " ").encode())
            for byte in range(256):
                if (piece := f"<0x{byte:02X}>") in pieces:
                    sizes[pieces[piece]] = 1
            if unknown in pieces:
                sizes[pieces[unknown]] = -1
        else:
            return None
        # The decoder's own add_prefix_space says nothing.
        parts = json.dumps([raw.get(key) for key in ("normalizer", "pre_tokenizer")])
        prefix = any(mark in parts for mark in ('"add_prefix_space": true', '"Prepend"', '"always"', '"first"'))
        return PieceSizes("bytes", sizes, prefix=prefix)


class SentenceFinder:
    """Token positions of sentences, for the documents of one tokenizer.

    slow_documents: how many had to be given to the reference encoder.
    """

    def __init__(self, folder: Path, reference: Encoder) -> None:
        self.slow_documents = 0
        self._reference = reference
        self._pieces = PieceSizes.of(folder)

    def __call__(self, texts: list[str], text: Text, encoded: Encoded) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Of each document's sentences but the first: index of its first, and the end [documents + 1], and the token
        at which each starts, from the document's first [sentences - documents]."""
        in_bytes, byte_starts = sentence_starts(text)
        if self._pieces is None:
            first, starts = np.zeros_like(in_bytes), byte_starts[:0]
            failed = np.ones(len(texts), dtype=np.uint8)
        else:
            first, starts, failed = _starts_by_pieces(self._pieces, text, encoded, in_bytes, byte_starts)
        slow = np.flatnonzero(failed & (np.diff(in_bytes) > 0))
        if not len(slow):
            return first, starts
        self.slow_documents += len(slow)
        lists = np.split(starts, first[1:-1])
        for number in slow:
            wanted = byte_starts[in_bytes[number] : in_bytes[number + 1]]
            lists[number] = self._by_reference(texts[number], wanted)
        counts = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        return np.concatenate(([0], np.cumsum(counts))), np.concatenate(lists)

    def _by_reference(self, text: str, byte_starts: NDArray[np.int32]) -> NDArray[np.int32]:
        begins = self._reference.token_starts(text)
        wanted: NDArray[Any] = byte_starts
        if not text.isascii():
            raw = np.frombuffer(text.encode(), dtype=np.uint8)
            wanted = np.cumsum((raw & 0xC0) != 0x80)[byte_starts] - 1
        tokens = np.unique(np.searchsorted(np.maximum.accumulate(begins), wanted, side="left"))
        return tokens[(tokens > 0) & (tokens < len(begins))].astype(np.int32)


def _starts_by_pieces(
    pieces: PieceSizes, text: Text, encoded: Encoded, in_bytes: NDArray[np.int64], byte_starts: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.uint8]]:
    """As `SentenceFinder`, and whether each document failed to add up [documents]."""
    first, starts = in_bytes.copy(), byte_starts.copy()
    failed = np.zeros(len(encoded.lengths), dtype=np.uint8)
    ids = np.ascontiguousarray(encoded.ids).view(np.uint32)
    lengths = np.ascontiguousarray(encoded.lengths, dtype=np.int64)
    library = native.load("sentences")
    common = (
        _pointer(ids),
        _pointer(lengths),
        ctypes.c_int64(len(lengths)),
        _pointer(pieces.sizes),
        ctypes.c_int64(len(pieces.sizes)),
    )
    positions = (_pointer(text.offsets), _pointer(first), _pointer(starts), _pointer(failed))
    if pieces.unit == "bytes":
        library.starts_by_bytes(*common, ctypes.c_int(pieces.prefix), *positions)
    else:
        library.starts_by_words(*common, ctypes.c_int(pieces.strips), text.data, *positions)
    return first, starts[: first[-1]].copy(), failed


def with_ends(encoded: Encoded, end_of_document: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The ids of all documents, each with `end_of_document` behind it [tokens + documents].

    dtype: uint16 or int32. Raises ValueError for an id that it cannot hold.
    """
    ids = np.ascontiguousarray(encoded.ids).view(np.uint32)
    lengths = np.ascontiguousarray(encoded.lengths, dtype=np.int64)
    out = np.empty(len(ids) + len(lengths), dtype=dtype)
    library = native.load("sentences")
    function = {2: library.with_ends_16, 4: library.with_ends_32}[out.itemsize]
    function.restype = ctypes.c_uint32
    largest = function(
        _pointer(ids), _pointer(lengths), ctypes.c_int64(len(lengths)), ctypes.c_uint32(end_of_document), _pointer(out)
    )
    if largest > np.iinfo(dtype).max:
        raise ValueError(f"token id {largest} does not fit {out.dtype.name}")
    return out


class SentencesWriter:
    """Collects the sentences of one shard and writes its `.sentences`; memory is 8 bytes a document, 4 a sentence."""

    def __init__(self, prefix: Path) -> None:
        self._path = prefix.with_name(prefix.name + SUFFIX)
        self._counts: list[NDArray[np.int64]] = []
        self._starts: list[NDArray[np.int32]] = []

    def append_batch(self, first: NDArray[np.int64], starts: NDArray[np.int32]) -> None:
        """Adds documents, as `SentenceFinder` gives them: without the sentences at token 0."""
        counts = np.diff(first)
        self._counts.append(counts + 1)
        self._starts.append(np.insert(starts, first[:-1], 0))

    def write(self) -> dict[str, FileRecord]:
        """Writes the file, whole under its name; its record by name."""
        documents = sum(map(len, self._counts))
        first = np.zeros(documents + 1, dtype="<i8")
        if documents:
            np.cumsum(np.concatenate(self._counts), out=first[1:])
        starts = np.concatenate([np.empty(0, dtype="<i4"), *self._starts]).astype("<i4", copy=False)
        content = _HEADER.pack(_MAGIC, _VERSION, documents, len(starts)) + first.tobytes() + starts.tobytes()
        durable.write_bytes(self._path, content)
        self.sentences = len(starts)
        return {self._path.name: FileRecord(len(content), hashlib.sha256(content).hexdigest())}


class Sentences:
    """The `.sentences` beside a shard, through a memory map.

    first: index of each document's first sentence, and the end [documents + 1].
    starts: first token of each sentence, from its document's first [sentences].

    Raises UserError when the file is missing, is not of the format or is cut off.
    """

    def __init__(self, prefix: Path) -> None:
        path = prefix.with_name(prefix.name + SUFFIX)
        try:
            with open(path, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise UserError(f"{path} is missing: tokenize again, without --no-sentences") from None
        except ValueError:
            raise UserError(f"{path} is empty: restore it or tokenize again") from None
        if len(content) < _HEADER.size or content[: len(_MAGIC)] != _MAGIC:
            raise UserError(
                f"{path} holds no sentence starts: it begins with {content[: len(_MAGIC)]!r}, not {_MAGIC!r}"
            )
        _, version, documents, sentences = _HEADER.unpack_from(content)
        expected = _HEADER.size + 8 * (documents + 1) + 4 * sentences
        if version != _VERSION or len(content) != expected:
            raise UserError(
                f"{path} is damaged or of another version (version {version}, {len(content)} bytes, expected version"
                f" {_VERSION}, {expected} bytes): tokenize again"
            )
        self.documents: int = documents
        self.first = np.frombuffer(content, "<i8", documents + 1, _HEADER.size)
        self.starts = np.frombuffer(content, "<i4", sentences, _HEADER.size + 8 * (documents + 1))

    def document(self, document: int) -> NDArray[np.int32]:
        """The first token of each sentence of one document, from its first token [sentences]."""
        return self.starts[self.first[document] : self.first[document + 1]]


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)
