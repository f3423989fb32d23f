"""Files that survive a crash: what has a final name is whole.

Every output of the project is written under a temporary name in the folder of its final one, fsynced, and
renamed; then the folder itself is fsynced, so that the new name survives a power cut as well (rename(2) is
atomic, but only an fsync of the directory makes it durable).

Bytes and names pass through functions of `os` alone, where the tests' double (tests/data_prep/faults.py) meets them.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

TEMPORARY_SUFFIX = ".partial"
_CHUNK_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 17
_OWNED = re.compile(r"\.(?P<host>\w+)-(?P<pid>\d+)-[0-9a-f]+" + re.escape(TEMPORARY_SUFFIX))
_ABANDONED_SECONDS = 86_400.0
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # a file system without hard links
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # only writing gives these


@functools.cache
def host_name() -> str:
    """Names the set of processes whose ids can be compared with ours: host, boot and process namespace."""
    name = re.sub(r"\W", "_", socket.gethostname())[:32]
    with contextlib.suppress(OSError):  # not on Linux: the host's name must do
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        namespace = os.stat("/proc/self/ns/pid").st_ino  # two containers of one host may share its name
        name += "_" + hashlib.sha256(boot + str(namespace).encode()).hexdigest()[:8]
    return name


def is_running(host: str, pid: int) -> bool | None:
    """Whether a process is there and not a zombie; None where it cannot be known, on another host."""
    if host != host_name():
        return None
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's process, or no /proc
        return True


def temporary_name(path: Path) -> Path:
    """A name under which `path` is written: same folder, given to nobody else on any host."""
    return path.with_name(f"{path.name}.{host_name()}-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def remove_temporary_files(folder: Path, *, ended: Collection[int] = (), alone: bool = False) -> None:
    """Removes what killed writers left in `folder` and below; never what a running process is writing.

    That is: of processes of this host that are gone (those in `ended` are), and whatever is older than a day. With
    `alone`, when nobody else can be at work there, everything but what names a running process of this host.
    """
    now = time.time()
    for path in folder.rglob(f"*{TEMPORARY_SUFFIX}"):
        owner = _OWNED.search(path.name)
        running = None
        if owner is not None:
            pid = int(owner["pid"])
            running = False if owner["host"] == host_name() and pid in ended else is_running(owner["host"], pid)
        with contextlib.suppress(FileNotFoundError):  # its owner was faster
            if running is False or (running is None and (alone or now - path.stat().st_mtime > _ABANDONED_SECONDS)):
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Makes creations, renames and removals in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _NewFile(io.RawIOBase):
    """An empty file at `path`, written through os.write; whole buffers come from the BufferedWriter around it."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: "ReadableBuffer") -> int:
        return os.write(self._descriptor, data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._descriptor, offset, whence)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        os.ftruncate(self._descriptor, size)
        return size

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


def _open_new(path: Path) -> BinaryIO:
    return cast(BinaryIO, io.BufferedWriter(_NewFile(path), _BUFFER_BYTES))


class DigestingFile:
    """What is written to `file` is counted and digested on its way; for writers that only append.

    bytes: written so far. sha256: of them, in hexadecimal.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: "ReadableBuffer") -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._file.write(view)
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[DigestingFile]:
    """Yields a new file at `path` itself, fsynced at the end: for folders that get their final name as a whole.

    Its name is durable once the folder is fsynced (`commit_folder`). On an exception what was written stays there.
    """
    file = _open_new(path)
    try:
        yield DigestingFile(file)
        file.flush()
        os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):  # the buffer may hold what could not be written
            file.close()
        raise
    file.close()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a binary file that takes the name `path`, whole, when the block ends without an exception.

    On an exception the temporary file is removed and whatever stood at `path` before is untouched. An OSError that a
    full disk gave without a name is raised with `path` as its `filename`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with _open_new(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            error.filename = str(path)
        raise
    fsync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` by a file holding `content`."""
    with replacing(path) as file:
        file.write(content)


def create(path: Path, content: bytes) -> bool:
    """Gives `content` the name `path`, whole, unless something has that name already: False then.

    Of any number of processes, on any hosts, that try at the same time, one succeeds. Not fsynced: what stands there
    is for processes that run at the same time. Raises FileNotFoundError when the folder is gone.
    """
    temporary = temporary_name(path)
    try:
        with _open_new(temporary) as file:
            file.write(content)
        os.link(temporary, path)  # atomic on NFS too
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            with open(path, "xb") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as indented JSON (floats round-trip; NaN is refused)."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Indented JSON in UTF-8; a lone surrogate (of a file's name, say), which UTF-8 does not have, stays an escape."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace")


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
    """Renames `temporary` to `folder`, whose name must be free; the files in it are fsynced already, the folders here.

    Raises OSError, and `folder` is not there then. (If even the way back fails, it is there and whole, but a power cut
    may take it.)
    """
    for root, _, _ in os.walk(temporary, topdown=False):
        fsync_folder(Path(root))
    if folder.exists():  # an empty folder would be replaced without a word
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
    os.replace(temporary, folder)
    try:
        fsync_folder(folder.parent)
    except OSError:
        os.replace(folder, temporary)
        raise


def remove_folder(folder: Path) -> None:
    """Removes a folder that has a final name, which it loses first: a half removed one does not pass for whole."""
    retired = temporary_name(folder)
    os.replace(folder, retired)
    shutil.rmtree(retired)


def fsync_file(path: Path) -> None:
    """Makes a file durable that something else has written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_folder(folder: Path, name: Path) -> None:
    """Gives a folder another name beside its old one, durably."""
    os.replace(folder, name)
    fsync_folder(name.parent)


def _fsync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_file(Path(root, name))
        fsync_folder(Path(root))


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, as hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
