"""Names of files, local ones and those of any fsspec address (s3://, gs://, hf://, memory://), read alike."""

import os
from dataclasses import dataclass
from glob import glob
from typing import Any, BinaryIO


def is_remote(name: str) -> bool:
    return "://" in name


def state(name: str) -> tuple[int, Any]:
    """(size in bytes, what changes when the content does: modification time or entity tag); raises OSError."""
    if not is_remote(name):
        status = os.stat(name)
        return status.st_size, status.st_mtime_ns
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(name)
    information = filesystem.info(path)
    changes = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")
    return int(information["size"] or 0), next((str(information[key]) for key in changes if key in information), None)


def open_binary(name: str) -> BinaryIO:
    """Opens a file for reading from any position; raises OSError."""
    if not is_remote(name):
        return open(name, "rb")
    import fsspec

    opened: BinaryIO = fsspec.open(name, "rb").open()
    return opened


def expand(pattern: str) -> list[str]:
    """The files that a name or glob matches, sorted."""
    if not is_remote(pattern):
        return sorted(match for match in glob(pattern, recursive=True) if os.path.isfile(match))
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(pattern)
    return sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(path))


@dataclass(frozen=True)
class InputFile:
    """One file of a job's input."""

    name: str
    bytes: int
    changed: Any

    @staticmethod
    def of(name: str) -> "InputFile":
        return InputFile(name, *state(name))
