"""Token shards: Megatron-Core's IndexedDataset (`.bin` + `.idx`) and the set of them that a manifest names.

This is the one module that knows the format; `data_prep` writes with it and `pipeline` reads with it. Layout of an
`.idx`, little-endian (megatron/core/datasets/indexed_dataset.py):
    9 bytes   magic b"MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     dtype code of the `.bin`
    uint64    number of sequences (ours: one a document)
    uint64    number of document indices, documents + 1
    int32[]   tokens of each sequence
    int64[]   byte offset of each sequence in the `.bin`
    int64[]   index of each document's first sequence, and the end
"""

import array
import functools
import hashlib
import json
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import durable
from data_prep.errors import UserError
from data_prep.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest
from data_prep.parts import PARTS_FOLDER

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<QBQQ")
_INT64 = struct.Struct("<q")
_DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}.items()
}
# Megatron's own bound (DType.optimal_dtype): some of the ids below 65,536 are kept free.
UINT16_VOCABULARY = 65_500
KIND = "shards"
_PAGE = 4096
_STRETCH = 1 << 16


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """uint16 for vocabularies of fewer than 65,500 ids, int32 otherwise."""
    return _DTYPES[8] if vocab_size < UINT16_VOCABULARY else _DTYPES[4]


class ShardWriter:
    """Writes one shard, `<prefix>.bin` and `<prefix>.idx`, batch by batch.

    Use as a context manager: both files get their names, whole, when the block ends without an exception; the
    `.idx` last, so that a shard with an index is complete. Memory is 4 bytes a document.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self._bin = prefix.with_name(prefix.name + ".bin")
        self._idx = prefix.with_name(prefix.name + ".idx")
        self._dtype = dtype
        self._lengths = array.array("i")
        self._digest = hashlib.sha256()

    def __enter__(self) -> "ShardWriter":
        self._replacing = durable.replacing(self._bin)
        self._file = self._replacing.__enter__()
        return self

    def append(self, ids: NDArray[Any]) -> None:
        """Adds one document of token ids [tokens]."""
        self.append_batch(ids, np.array([len(ids)]))

    def append_batch(self, ids: NDArray[Any], lengths: NDArray[Any]) -> None:
        """Adds documents.

        ids: of all of them, one after the other [tokens]. lengths: tokens of each [documents].

        Raises ValueError for an id that the dtype cannot hold.
        """
        if len(ids) and ids.dtype != self._dtype and not 0 <= int(ids.min()) <= int(ids.max()) <= max_id(self._dtype):
            raise ValueError(f"token ids from {ids.min()} to {ids.max()} do not fit {self._dtype.name}")
        data = np.ascontiguousarray(ids, dtype=self._dtype).data
        self._file.write(data)
        self._digest.update(data)
        self._lengths.frombytes(np.ascontiguousarray(lengths, dtype=np.intc).tobytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._replacing.__exit__(kind, error, trace)
        if kind is not None:
            return
        lengths = np.frombuffer(self._lengths, dtype=np.intc)
        self.tokens = int(lengths.sum(dtype=np.int64))
        self.documents = len(lengths)
        index = index_bytes(lengths, self._dtype)
        durable.write_bytes(self._idx, index)
        self.files = {
            self._bin.name: FileRecord(self.tokens * self._dtype.itemsize, self._digest.hexdigest()),
            self._idx.name: FileRecord(len(index), hashlib.sha256(index).hexdigest()),
        }


def max_id(dtype: np.dtype[Any]) -> int:
    """The largest token id that `dtype` holds."""
    return int(np.iinfo(dtype).max)


def index_bytes(lengths: NDArray[Any], dtype: np.dtype[Any]) -> bytes:
    """The `.idx` of documents of these lengths (tokens), one sequence each."""
    sizes = np.asarray(lengths, dtype="<i4")
    pointers = np.zeros(len(sizes), dtype="<i8")
    np.cumsum(sizes[:-1], dtype="<i8", out=pointers[1:])
    pointers *= dtype.itemsize
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    header = _HEADER.pack(_VERSION, code, len(sizes), len(sizes) + 1)
    return b"".join(
        (
            _MAGIC,
            header,
            sizes.tobytes(),
            pointers.tobytes(),
            np.arange(len(sizes) + 1, dtype="<i8").tobytes(),
        )
    )


class Shard:
    """One shard, read through memory maps.

    tokens: the ids of all documents, one after the other [tokens].
    document_offsets: first token of each document, and the end [documents + 1].

    Raises UserError when a file is missing, is not of the format, or the two do not fit together.
    """

    def __init__(self, prefix: Path) -> None:
        self.path = prefix.with_name(prefix.name + ".bin")
        index_path = prefix.with_name(prefix.name + ".idx")
        try:
            index = _map(index_path)
            size = self.path.stat().st_size
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing: the shard is incomplete; tokenize again") from None
        head = len(_MAGIC)
        if bytes(index[:head]) != _MAGIC:
            raise UserError(
                f"{index_path} is no Megatron index: it starts with {bytes(index[:head])!r}, not {_MAGIC!r}"
            )
        try:
            version, code, sequences, boundaries = _HEADER.unpack_from(index, head)
            if version != _VERSION or code not in _DTYPES or boundaries < 1:
                raise ValueError(f"version {version}, dtype code {code}")
            expected = head + _HEADER.size + 12 * sequences + 8 * boundaries
            if sequences and len(index) == expected + sequences:
                raise ValueError("it has sequence modes: a multimodal data set, not token ids alone")
            if len(index) != expected:
                raise ValueError(f"{len(index)} bytes, expected {expected}")
            position = head + _HEADER.size
            lengths = np.frombuffer(index, "<i4", sequences, position)
            pointers = np.frombuffer(index, "<i8", sequences, position + 4 * sequences)
            documents = np.frombuffer(index, "<i8", boundaries, position + 12 * sequences)
        except (struct.error, ValueError) as error:
            raise UserError(f"{index_path} is damaged or of another version ({error})") from None
        self.dtype = _DTYPES[code]
        # Where the last sequence ends; that the others lie one after the other is for `fault` to say.
        expected = int(pointers[-1]) + int(lengths[-1]) * self.dtype.itemsize if sequences else 0
        if size != expected:
            raise UserError(f"{self.path} has {size} bytes, {index_path.name} expects {expected}: the shard is damaged")
        self._lengths, self._pointers, self._documents = lengths, pointers, documents
        self.documents = boundaries - 1
        self._size = size

    @functools.cached_property
    def tokens(self) -> NDArray[Any]:
        return np.frombuffer(_map(self.path), self.dtype) if self._size else np.empty(0, self.dtype)

    @property
    def token_count(self) -> int:
        return self._size // self.dtype.itemsize

    def document_offset(self, document: int) -> int:
        """The first token of a document; for `documents`, the number of tokens in the shard."""
        return int(self.offsets_of(np.array([document]))[0])

    def offsets_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """`document_offset` of each of these documents [documents]."""
        first = self._documents[documents]
        offsets = np.full(len(first), self.token_count, dtype=np.int64)
        inside = first < len(self._pointers)  # not so for the end, nor for empty documents before it
        offsets[inside] = self._pointers[first[inside]] // self.dtype.itemsize
        return offsets

    def document_at(self, token: int) -> int:
        """The document that holds a token; searches the index, and reads little of it."""
        sequence = int(np.searchsorted(self._pointers, token * self.dtype.itemsize, side="right")) - 1
        return int(np.searchsorted(self._documents, sequence, side="right")) - 1

    @functools.cached_property
    def document_offsets(self) -> NDArray[np.int64]:
        return self.offsets_of(np.arange(self.documents + 1))

    def fault(self) -> str | None:
        """What is wrong with the index beyond its size, or None: reads all of it, and none of the tokens."""
        if not np.issubdtype(self.dtype, np.integer):
            return f"{self.path} holds {self.dtype.name} values, not token ids"
        steps = self._lengths[:-1].astype(np.int64) * self.dtype.itemsize
        if len(self._pointers) and (self._pointers[0] != 0 or np.any(np.diff(self._pointers) != steps)):
            return f"{self.path.with_suffix('.idx')}: the sequences do not lie one after the other"
        first = self._documents
        if first[0] != 0 or first[-1] != len(self._lengths) or np.any(np.diff(first) < 0):
            return f"{self.path.with_suffix('.idx')}: the documents do not follow one another to the last sequence"
        return None

    def document(self, document: int) -> NDArray[Any]:
        """The token ids of one document [tokens]."""
        return self.tokens[self.document_offset(document) : self.document_offset(document + 1)]


def _map(path: Path) -> mmap.mmap | bytes:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@dataclass(frozen=True)
class ShardSet:
    """The shards of one corpus, in the order of its manifest; those of another program, in the order of their names.

    fingerprint: sha256 over the shards' checksums; two sets with equal fingerprints hold the same tokens (of shards of
        another program: see `_foreign_fingerprint`).
    vocab_size, tokenizer_fingerprint: of the tokenizer that made them; None in shards of another program, for their
        files do not say.
    end_of_document: id that ends every document; None likewise.
    text_bytes: of the documents, in UTF-8; None likewise.
    """

    folder: Path
    names: tuple[str, ...]
    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    vocab_size: int | None
    tokenizer_fingerprint: str | None
    end_of_document: int | None
    fingerprint: str
    text_bytes: int | None = None

    @staticmethod
    def open(folder: Path) -> "ShardSet":
        """Reads the manifest; the shards themselves are mapped by `shard`.

        A folder of `.bin` and `.idx` without a manifest, as Megatron's preprocess_data leaves it, is read from its
        indexes. Raises UserError when `folder` holds no finished shard set.
        """
        if is_foreign(folder):
            return _open_foreign(folder)
        manifest = read_manifest(folder, KIND)
        content = manifest.content
        try:
            return ShardSet(
                folder=folder,
                names=tuple(shard["name"] for shard in content["shards"]),
                documents=tuple(shard["documents"] for shard in content["shards"]),
                tokens=tuple(shard["tokens"] for shard in content["shards"]),
                vocab_size=content["tokenizer"]["vocab_size"],
                tokenizer_fingerprint=content["tokenizer"]["fingerprint"],
                end_of_document=content["tokenizer"]["end_of_document"],
                fingerprint=files_fingerprint(manifest),
                text_bytes=content.get("text_bytes"),
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / MANIFEST_NAME} is damaged ({error!r}): tokenize again") from None

    def shard(self, index: int) -> Shard:
        """Maps shard `index`; raises UserError when it is not what the manifest says."""
        shard = Shard(self.folder / self.names[index])
        found = (shard.documents, shard.token_count)
        expected = (self.documents[index], self.tokens[index])
        if found != expected:
            raise UserError(
                f"{shard.path} holds {found[0]} documents and {found[1]} tokens, the manifest says {expected[0]} and"
                f" {expected[1]}: it was replaced or damaged; run `python -m data_prep verify {self.folder}`"
            )
        return shard

    def document_offset(self, index: int, document: int) -> int:
        """The first token of a document of shard `index`, by three small reads: thousands of shards are planned in a
        fraction of the time that mapping them takes. What else is in the shard is checked when it is opened.

        Raises UserError as `shard` does.
        """
        path = self.folder / f"{self.names[index]}.idx"
        head = len(_MAGIC)
        try:
            with open(path, "rb", buffering=0) as file:
                raw = os.pread(file.fileno(), head + _HEADER.size, 0)
                _, code, sequences, boundaries = _HEADER.unpack_from(raw, head)
                if raw[:head] != _MAGIC or boundaries != self.documents[index] + 1 or code not in _DTYPES:
                    raise ValueError
                lists = head + _HEADER.size
                (first,) = _INT64.unpack(os.pread(file.fileno(), 8, lists + 12 * sequences + 8 * document))
                if first == sequences:
                    return self.tokens[index]
                (pointer,) = _INT64.unpack(os.pread(file.fileno(), 8, lists + 4 * sequences + 8 * first))
                return int(pointer // _DTYPES[code].itemsize)
        except (OSError, ValueError, struct.error):
            return self.shard(index).document_offset(document)  # which says what is wrong


def has_shards(folder: Path) -> bool:
    """True when `folder` holds a finished shard set, ours or another program's."""
    return (folder / MANIFEST_NAME).exists() or is_foreign(folder)


def is_foreign(folder: Path) -> bool:
    """True when `folder` holds shards of another program: indexes, no manifest, and no unfinished work of ours."""
    # In this order: our own jobs have their parts' records before the first shard, and their manifest before those go.
    if next(folder.glob("*.idx"), None) is None:
        return False
    return not (folder / PARTS_FOLDER).exists() and not (folder / MANIFEST_NAME).exists()


def _open_foreign(folder: Path) -> ShardSet:
    names = sorted(path.name.removesuffix(".idx") for path in folder.glob("*.idx"))
    shards = [Shard(folder / name) for name in names]
    for fault in (shard.fault() for shard in shards):
        if fault:
            raise UserError(f"{fault}; write the shards again")
    return ShardSet(
        folder=folder,
        names=tuple(names),
        documents=tuple(shard.documents for shard in shards),
        tokens=tuple(shard.token_count for shard in shards),
        vocab_size=None,
        tokenizer_fingerprint=None,
        end_of_document=None,
        fingerprint=_foreign_fingerprint(shards),
    )


def _foreign_fingerprint(shards: list[Shard]) -> str:
    """sha256 over names, dtypes and indexes, and 64 pages of 4,096 tokens, evenly spaced, of each `.bin`.

    Notices other documents, another order or another tokenizer, at the cost of the index; a few changed tokens in a
    large file, only where it looks.
    """
    digest = hashlib.sha256()
    for shard in shards:
        index = shard.path.with_suffix(".idx")
        digest.update(json.dumps([shard.path.name, shard.dtype.str, durable.sha256_of(index)]).encode())
        for start in np.linspace(0, max(0, len(shard.tokens) - _PAGE), 64).astype(np.int64):
            digest.update(np.ascontiguousarray(shard.tokens[start : start + _PAGE]).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Survey:
    """What the tokens themselves say of a shard set, where no manifest does.

    tokens, documents: how many of them were looked at.
    smallest, largest: ids seen. last: the id that ends most documents, and last_share, the share it ends.
    """

    tokens: int
    documents: int
    smallest: int
    largest: int
    last: int
    last_share: float


def survey(shards: ShardSet, max_tokens: int = 1 << 24, max_documents: int = 1 << 16) -> Survey:
    """Looks at all tokens of a set of at most `max_tokens`, at as many in evenly spaced stretches of a larger one; and
    at the ends of documents likewise."""
    smallest, largest, seen = 0, 0, 0
    ends: list[NDArray[np.int64]] = []
    token_bounds, document_bounds = np.cumsum((0, *shards.tokens)), np.cumsum((0, *shards.documents))
    total, documents = int(token_bounds[-1]), int(document_bounds[-1])
    stretch = total if total <= max_tokens else min(_STRETCH, max_tokens)
    starts = np.linspace(0, total - stretch, max(1, max_tokens // max(1, stretch)) if stretch < total else 1)
    chosen = np.unique(np.linspace(0, max(0, documents - 1), min(documents, max_documents)).astype(np.int64))
    for index in range(len(shards.names)):
        shard, first = shards.shard(index), int(token_bounds[index])
        for start in starts.astype(np.int64) - first:
            tokens = shard.tokens[max(0, start) : max(0, start + stretch)]
            seen += len(tokens)
            smallest = min(smallest, int(tokens.min(initial=0)))
            largest = max(largest, int(tokens.max(initial=0)))
        inside = (chosen >= document_bounds[index]) & (chosen < document_bounds[index + 1])
        local = chosen[inside] - document_bounds[index]
        begin, end = shard.offsets_of(local), shard.offsets_of(local + 1)
        ends.append(shard.tokens[end[end > begin] - 1].astype(np.int64))
    values, counts = np.unique(np.concatenate([*ends, np.empty(0, np.int64)]), return_counts=True)
    last, share = (int(values[counts.argmax()]), float(counts.max() / counts.sum())) if len(values) else (-1, 0.0)
    return Survey(seen, len(chosen), smallest, largest, last, share)


def files_fingerprint(manifest: Manifest) -> str:
    """sha256 over the names and checksums of a manifest's files."""
    records = sorted((name, record.sha256) for name, record in manifest.files.items())
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()


def unigram_entropy(shards: ShardSet, max_tokens: int = 1 << 26) -> float:
    """Entropy in nats a token of the corpus's token frequencies: what a model without context can reach.

    Counts the first `max_tokens` tokens of the set (all of a small corpus).
    """
    counts = np.zeros(0, dtype=np.int64)
    for index in range(len(shards.names)):
        tokens = shards.shard(index).tokens[: max_tokens - int(counts.sum())]
        found = np.bincount(tokens, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
        if counts.sum() >= max_tokens:
            break
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())
