"""Names of files, local ones and those of any fsspec address (s3://, gs://, hf://, memory://), read alike."""

import bz2
import gzip
import io
import lzma
import os
import zlib
from dataclasses import dataclass
from glob import glob, has_magic
from typing import Any, BinaryIO

DATASET = "dataset:"
"""Begins the name of a data set of the datasets library: dataset:NAME_OR_FOLDER[?split=S&config=C]."""
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
DECOMPRESSION_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)
_BUFFER_BYTES = 1 << 20
_GZIP_MEMBER = b"\x1f\x8b\x08"  # how one begins (RFC 1952, section 2.3.1)
_DECOMPRESSED_BYTES = 1 << 17  # what a truncated zstd may lose of its last documents


def is_remote(name: str) -> bool:
    return "://" in name


def is_dataset(name: str) -> bool:
    return name.startswith(DATASET)


def state(name: str) -> tuple[int, Any]:
    """(size in bytes, what changes when the content does: modification time or entity tag); raises OSError."""
    if is_dataset(name):
        return _dataset_state(name.removeprefix(DATASET).partition("?")[0])
    if not is_remote(name):
        status = os.stat(name)
        return status.st_size, status.st_mtime_ns
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(name)
    information = filesystem.info(path)
    changes = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")
    return int(information["size"] or 0), next((str(information[key]) for key in changes if key in information), None)


def _dataset_state(path: str) -> tuple[int, Any]:
    """Of a folder: bytes of all its files and their latest change. Of the hub: 0 and the commit."""
    if os.path.isdir(path):
        files = [os.stat(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names]
        return sum(file.st_size for file in files), max((file.st_mtime_ns for file in files), default=0)
    import huggingface_hub

    return 0, huggingface_hub.HfApi().dataset_info(path).sha


def open_binary(name: str) -> BinaryIO:
    """Opens a file for reading from any position; raises OSError."""
    if not is_remote(name):
        return open(name, "rb")
    import fsspec

    opened: BinaryIO = fsspec.open(name, "rb").open()
    return opened


class Watched(io.RawIOBase):
    """A file being read that remembers whether reading it failed.

    Whatever else goes wrong in a decoder above it is then a fault of the data. Local or remote; never buffers.

    bytes_read: how much has been read so far.
    """

    def __init__(self, name: str) -> None:
        self.failure: Exception | None = None
        self.bytes_read = 0
        self._name = name
        self._file: Any = open_binary(name) if is_remote(name) else io.FileIO(name)
        self._size: int = self._file.seek(0, io.SEEK_END)
        self._file.seek(0)

    def raise_failure(self) -> None:
        """Raises OSError if the file could not be read; decoders are free to raise something else for it."""
        error = self.failure
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror or str(error), self._name) from error
        if error is not None:
            raise OSError(f"{self._name}: cannot be read: {' '.join(str(error).split())}") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._file.tell()
        if not 0 <= size <= left:  # damaged files ask for more than there is memory
            size = max(left, 0)
        try:
            data: bytes = self._file.read(size)
        except Exception as error:
            self.failure = error
            raise
        self.bytes_read += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        try:
            size: int = self._file.readinto(buffer)
        except Exception as error:
            self.failure = error
            raise
        self.bytes_read += size
        return size

    def seek(self, offset: int, whence: int = 0) -> int:
        position: int = self._file.seek(offset, whence)
        return position

    def tell(self) -> int:
        position: int = self._file.tell()
        return position

    def close(self) -> None:
        self._file.close()
        super().close()


class _Decompressed(io.RawIOBase):
    """What the standard library's decompressors give, at most one step of theirs a read.

    Whatever they decoded before they met damage has then been handed on.
    """

    def __init__(self, stream: Any, source: "io.BufferedReader[Any]") -> None:
        self._stream, self.source = stream, source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def buffered(name: str, file: Watched) -> "io.BufferedReader[Any]":
    """The content of `file`, decompressed as its name says, with bounded memory.

    Damage raises one of `DECOMPRESSION_ERRORS`, after what comes before it was read.
    """
    if name.endswith(".zst"):
        import pyarrow  # brings zstd along; imported late, most inputs do not need it

        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), _DECOMPRESSED_BYTES)
    plain: io.BufferedReader[Any] = io.BufferedReader(file, _BUFFER_BYTES)
    if name.endswith(".gz"):
        return io.BufferedReader(_Decompressed(gzip.GzipFile(fileobj=plain), plain), _DECOMPRESSED_BYTES)
    if name.endswith(".bz2"):
        return io.BufferedReader(_Decompressed(bz2.BZ2File(plain), plain), _DECOMPRESSED_BYTES)
    if name.endswith(".xz"):
        return io.BufferedReader(_Decompressed(lzma.LZMAFile(plain), plain), _DECOMPRESSED_BYTES)
    return plain


def next_gzip_member(stream: "io.BufferedReader[Any]") -> "io.BufferedReader[Any] | None":
    """What follows the member that damage was met in, as far as that can be found; None at the end.

    stream: of a .gz file, from `buffered`. A few kB of compressed data behind the damage are passed over too.
    """
    source = stream.raw.source
    carry = b""
    while block := source.read(_BUFFER_BYTES):
        block = carry + block
        if (found := block.find(_GZIP_MEMBER)) >= 0:
            source.seek(found - len(block), io.SEEK_CUR)
            return io.BufferedReader(_Decompressed(gzip.GzipFile(fileobj=source), source), _DECOMPRESSED_BYTES)
        carry = block[-len(_GZIP_MEMBER) + 1 :]
    return None


def expand(pattern: str) -> list[str]:
    """The files that a name or glob matches, sorted; a name may itself hold brackets."""
    if not is_remote(pattern):
        found = [pattern] if os.path.exists(pattern) or not has_magic(pattern) else glob(pattern, recursive=True)
        return sorted(match for match in found if os.path.isfile(match))
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(pattern)
    if filesystem.isfile(path):
        return [pattern]
    return sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(path) if filesystem.isfile(match))


@dataclass(frozen=True)
class InputFile:
    """One file of a job's input."""

    name: str
    bytes: int
    changed: Any

    @staticmethod
    def of(name: str) -> "InputFile":
        return InputFile(name, *state(name))
