"""Token ids of a shard set by position, read from the files themselves.

`pread` rather than a memory map: what has been cut off or cannot be read is an error that names its place, where a map
would end the process with SIGBUS; and only the bytes that are asked for are touched.
"""

import ctypes
import os
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import native
from data_prep.errors import UserError
from data_prep.shards import ShardSet

_MOST_OPEN = 256
_LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Stretch:
    """Tokens [first, first + tokens) of a document of `document_tokens`, number `document` of its shard, and where they
    lie in the shard's file: bytes [begin_byte, end_byte)."""

    shard: Path
    document: int
    first: int
    tokens: int
    document_tokens: int
    begin_byte: int
    end_byte: int


@dataclass
class _Open:
    """An open shard. state: what its file looked like when it was opened. looked: when its name was last looked up."""

    path: Path
    descriptor: int
    state: tuple[int, ...]
    looked: float


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read(
    descriptors: NDArray[np.int32],
    offsets: NDArray[np.int64],
    sizes: NDArray[np.int64],
    positions: NDArray[np.int64],
    out: NDArray[Any],
) -> tuple[int | None, str]:
    """Reads stretches of files, in bytes, to their positions in `out`, without the interpreter's lock.

    Returns the number of the one that could not be read, if any, and why ("": the file ends before it).
    """
    assert out.flags.c_contiguous and out.flags.writeable
    error = ctypes.c_int32()
    function = native.load("samples").read_stretches
    function.restype = ctypes.c_int64
    arrays = [np.ascontiguousarray(array) for array in (descriptors, offsets, sizes, positions)]
    failed = function(
        *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
        ctypes.c_int64(len(offsets)),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.byref(error),
    )
    if failed == -2:
        raise MemoryError
    return (None if failed < 0 else failed), os.strerror(error.value) if error.value else ""


class TokenFiles:
    """The `.bin` files of a shard set, opened when they are first read."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._bounds = np.cumsum((0, *shards.tokens))
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self.dtype = next((shards.shard(i).dtype for i, tokens in enumerate(shards.tokens) if tokens), np.dtype("<u2"))

    def read(
        self,
        start: NDArray[np.int64],
        length: NDArray[np.int64],
        out: NDArray[Any],
        position: NDArray[np.int64],
    ) -> None:
        """Copies stretches of tokens into `out`, which is flat and of `dtype`.

        start, length: first token of each, counted over all of the set's, and how many [stretches]. position: where
        each goes in `out`.

        Raises UserError naming the shard and its bytes when it was cut off, replaced, changed or cannot be read.
        """
        shard = np.searchsorted(self._bounds, start, side="right") - 1
        room = self._bounds[shard + 1] - start
        if np.any(length > room):  # over the end of a shard: once a shard and epoch
            self.read(start, np.minimum(length, room), out, position)
            over = length > room
            self.read((start + room)[over], (length - room)[over], out, (position + room)[over])
            return
        distinct = sorted(set(shard.tolist()))
        if len(distinct) > _MOST_OPEN:
            near = shard <= distinct[len(distinct) // 2]
            for half in (near, ~near):
                self.read(start[half], length[half], out, position[half])
            return
        if not len(distinct):
            return
        size = self.dtype.itemsize
        files = {index: self._file(index) for index in distinct}
        descriptors = np.array([file.descriptor for file in files.values()], dtype=np.int32)
        offsets, sizes = (start - self._bounds[shard]) * size, length * size
        failed, reason = _read(descriptors[np.searchsorted(distinct, shard)], offsets, sizes, position * size, out)
        if failed is not None:
            end = int(offsets[failed] + sizes[failed])
            raise self._fault(
                files[int(shard[failed])], int(offsets[failed]), end, reason or f"it ends before byte {end:,}"
            )
        for index, file in files.items():
            if (change := self._change(file)) is not None:
                of_file = shard == index
                raise self._fault(file, int(offsets[of_file].min()), int((offsets + sizes)[of_file].max()), change)
        while len(self._open) > _MOST_OPEN:
            os.close(self._open.popitem(last=False)[1].descriptor)

    def document_of(self, token: int) -> tuple[int, int]:
        """The shard and the document in it that hold a token of the set."""
        index = int(np.searchsorted(self._bounds, token, side="right")) - 1
        return index, self._shards.shard(index).document_at(token - int(self._bounds[index]))

    def documents(self, start: int, length: int) -> list["Stretch"]:
        """The documents that tokens [start, start + length) of the set belong to, in order."""
        found = []
        while length > 0:
            index, document = self.document_of(start)
            shard, base = self._shards.shard(index), int(self._bounds[index])
            begin, end = shard.document_offset(document) + base, shard.document_offset(document + 1) + base
            take = min(length, end - start)
            first = (start - base) * self.dtype.itemsize
            last = first + take * self.dtype.itemsize
            found.append(Stretch(shard.path, document, start - begin, take, end - begin, first, last))
            start, length = start + take, length - take
        return found

    def _file(self, index: int) -> _Open:
        file = self._open.get(index)
        if file is None:
            shard = self._shards.shard(index)
            if shard.dtype != self.dtype:
                raise UserError(f"{shard.path} holds {shard.dtype.name}, the others {self.dtype.name}: tokenize again")
            try:
                descriptor = os.open(shard.path, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"{shard.path} cannot be read: {error.strerror}; restore it and resume") from None
            # Samples lie anywhere: what the kernel would read around them is not wanted.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            file = _Open(shard.path, descriptor, _state(os.fstat(descriptor)), time.monotonic())
            self._open[index] = file
        else:
            self._open.move_to_end(index)
        return file

    def _change(self, file: _Open) -> str | None:
        """How the file differs from the one that was opened. Its name is looked up now and then only: what stands
        there in its stead is not what is read."""
        now = time.monotonic()
        try:
            found = os.fstat(file.descriptor)
            if _state(found) == file.state and now - file.looked > _LOOK_SECONDS:
                file.looked = now
                found = os.stat(file.path)
        except OSError as error:
            return error.strerror
        state = _state(found)
        if state == file.state:
            return None
        if state[:2] != file.state[:2]:
            return "another file has taken its name"
        if state[2] != file.state[2]:
            return f"it has {state[2]:,} bytes, and had {file.state[2]:,} when it was opened"
        return "its content was changed after it was opened"

    def _fault(self, file: _Open, begin: int, end: int, reason: str) -> UserError:
        return UserError(
            f"{file.path}, bytes {begin:,} to {end:,}: {reason}; nothing of it is trained on. Restore the shard, check"
            f" it with `python -m data_prep verify {self._shards.folder}`, and resume"
        )

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1].descriptor)
