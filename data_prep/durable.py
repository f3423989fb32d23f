"""Files that survive a crash: what has a final name is whole.

Every output of the project is written under a temporary name in the folder of its final one, fsynced, and
renamed; then the folder itself is fsynced, so that the new name survives a power cut as well (rename(2) is
atomic, but only an fsync of the directory makes it durable).
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_SUFFIX = ".partial"
_CHUNK_BYTES = 1 << 20


def temporary_name(path: Path) -> Path:
    """The name under which `path` is written: same folder, unique to this process."""
    return path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")


def fsync_folder(folder: Path) -> None:
    """Makes creations, renames and removals in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a binary file that takes the name `path`, whole, when the block ends without an exception.

    On an exception the temporary file is removed and whatever stood at `path` before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` by a file holding `content`."""
    with replacing(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as indented JSON (floats round-trip; NaN is refused)."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def replacing_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that takes the name `folder`, fsynced file by file, when the block ends well.

    With `overwrite`, a folder that stands there gives up its name only when the new one is whole. Raises
    FileExistsError when one is there, not empty, and `overwrite` is not set; on any exception the temporary folder is
    removed and what stood there is untouched.
    """
    occupied = folder.exists() and any(folder.iterdir())
    if occupied and not overwrite:
        raise FileExistsError(f"{folder} exists and is not empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    retired = temporary_name(folder.with_name(f"{folder.name}.old"))
    try:
        yield temporary
        _fsync_tree(temporary)
        if occupied:
            os.replace(folder, retired)
        os.replace(temporary, folder)
        fsync_folder(folder.parent)
    except BaseException:
        if retired.exists() and not folder.exists():
            os.replace(retired, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def commit_folder(temporary: Path, folder: Path) -> None:
    """Fsyncs every file and folder below `temporary`, then renames it to `folder` (absent or empty)."""
    _fsync_tree(temporary)
    os.replace(temporary, folder)
    fsync_folder(folder.parent)


def _fsync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_folder(Path(root))


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, as hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
