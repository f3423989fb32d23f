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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import durable
from data_prep.errors import UserError
from data_prep.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<QBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}.items()
}
# Megatron's own bound (DType.optimal_dtype): some of the ids below 65,536 are kept free.
UINT16_VOCABULARY = 65_500
KIND = "shards"


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """uint16 for vocabularies of fewer than 65,500 ids, int32 otherwise."""
    return _DTYPES[8] if vocab_size < UINT16_VOCABULARY else _DTYPES[4]


class ShardWriter:
    """Writes one shard, `<prefix>.bin` and `<prefix>.idx`, document by document.

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
        data = np.ascontiguousarray(ids, dtype=self._dtype).data
        self._file.write(data)
        self._digest.update(data)
        self._lengths.append(len(ids))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._replacing.__exit__(kind, error, trace)
        if kind is not None:
            return
        size = sum(self._lengths) * self._dtype.itemsize
        index = index_bytes(self._lengths, self._dtype)
        durable.write_bytes(self._idx, index)
        self.tokens = sum(self._lengths)
        self.documents = len(self._lengths)
        self.files = {
            self._bin.name: FileRecord(size, self._digest.hexdigest()),
            self._idx.name: FileRecord(len(index), hashlib.sha256(index).hexdigest()),
        }


def index_bytes(lengths: Iterable[int], dtype: np.dtype[Any]) -> bytes:
    """The `.idx` of documents of these lengths (tokens), one sequence each."""
    sizes = np.fromiter(lengths, dtype="<i4")
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
            if len(index) != expected:
                raise ValueError(f"{len(index)} bytes, expected {expected}")
            position = head + _HEADER.size
            lengths = np.frombuffer(index, "<i4", sequences, position)
            pointers = np.frombuffer(index, "<i8", sequences, position + 4 * sequences)
            documents = np.frombuffer(index, "<i8", boundaries, position + 12 * sequences)
        except (struct.error, ValueError) as error:
            raise UserError(f"{index_path} is damaged or of another version ({error})") from None
        self.dtype = _DTYPES[code]
        expected = int(lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if size != expected:
            raise UserError(f"{self.path} has {size} bytes, {index_path.name} expects {expected}: the shard is damaged")
        self._pointers, self._documents = pointers, documents
        self.documents = boundaries - 1
        self.tokens: NDArray[Any] = np.frombuffer(_map(self.path), self.dtype) if size else np.empty(0, self.dtype)

    def document_offset(self, document: int) -> int:
        """The first token of a document; for `documents`, the number of tokens in the shard."""
        if document == self.documents:
            return len(self.tokens)
        return int(self._pointers[self._documents[document]]) // self.dtype.itemsize

    @functools.cached_property
    def document_offsets(self) -> NDArray[np.int64]:
        starts = np.asarray(self._documents[:-1])
        inner = self._pointers[starts] // self.dtype.itemsize
        return np.append(inner, len(self.tokens)).astype(np.int64)

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
    """The shards of one corpus, in the order of its manifest.

    fingerprint: sha256 over the shards' checksums; two sets with equal fingerprints hold the same tokens.
    end_of_document: id that ends every document.
    """

    folder: Path
    names: tuple[str, ...]
    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    vocab_size: int
    tokenizer_fingerprint: str
    end_of_document: int
    fingerprint: str

    @staticmethod
    def open(folder: Path) -> "ShardSet":
        """Reads the manifest; the shards themselves are mapped by `shard`.

        Raises UserError when `folder` holds no finished shard set.
        """
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
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / MANIFEST_NAME} is damaged ({error!r}): tokenize again") from None

    def shard(self, index: int) -> Shard:
        """Maps shard `index`; raises UserError when it is not what the manifest says."""
        shard = Shard(self.folder / self.names[index])
        found = (shard.documents, len(shard.tokens))
        expected = (self.documents[index], self.tokens[index])
        if found != expected:
            raise UserError(
                f"{shard.path} holds {found[0]} documents and {found[1]} tokens, the manifest says {expected[0]} and"
                f" {expected[1]}: it was replaced or damaged; run `python -m data_prep verify {self.folder}`"
            )
        return shard


def files_fingerprint(manifest: Manifest) -> str:
    """sha256 over the names and checksums of a manifest's files."""
    records = sorted((name, record.sha256) for name, record in manifest.files.items())
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()


def unigram_entropy(shards: ShardSet, max_tokens: int = 1 << 26) -> float:
    """Entropy in nats a token of the corpus's token frequencies: what a model without context can reach.

    Counts the first `max_tokens` tokens of the set (all of a small corpus).
    """
    counts = np.zeros(shards.vocab_size, dtype=np.int64)
    for index in range(len(shards.names)):
        tokens = shards.shard(index).tokens[: max_tokens - int(counts.sum())]
        counts += np.bincount(tokens, minlength=shards.vocab_size)
        if counts.sum() >= max_tokens:
            break
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())
