"""A double of the storage below durable files: at its k-th operation it fails, writes short, tears, kills or loses.

`faulty(folder, ...)` gives the environment variables of a program, all of whose processes share one count. `Storage` is
for a save in this process: it also counts writes, and knows what a power cut would have left.
"""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SITE = """
import os, signal
operation, number, fault, counter = os.environ["DATA_PREP_FAULT"].split(" ", 3)
real = getattr(os, operation)

def faulty(*arguments, **options):
    descriptor = os.open(counter, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.ftruncate(descriptor, os.lseek(descriptor, 0, os.SEEK_END) + 1)
    count = os.lseek(descriptor, 0, os.SEEK_END)  # of all processes together
    os.close(descriptor)
    if count == int(number):
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(int(fault), os.strerror(int(fault)))
    return real(*arguments, **options)

setattr(os, operation, faulty)
"""


def faulty(folder: Path, operation: str, number: int, fault: str) -> dict[str, str]:
    """operation: "replace", "fsync" or "write"; number: from 1; fault: "kill" or an errno; `folder` keeps the count."""
    (folder / "sitecustomize.py").write_text(_SITE)
    return {
        "DATA_PREP_FAULT": f"{operation} {number} {fault} {folder / 'operations'}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
    }


ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT}
WRITE_FAULTS = ("short", "tear")
CUTS = ("lost data", "lost names", "lost both")
FAULTS = ("kill", *ERRORS, *WRITE_FAULTS, *CUTS)


class Killed(BaseException):
    """The process is gone: nothing below the storage's root happens any more."""


class Storage:
    """In a `with` block, the operations of `os` below `root` count, and the one with `number` meets `fault`.

    fault: one of FAULTS, or None to count alone. A short write takes half of the bytes and says so; a torn one takes
    half and kills; a cut kills, and `left(target)` is what is then on disk. operations: their names, in order. fired:
    whether the fault has come. fsyncs: False for a disk that forgets them.
    """

    fsyncs = True

    def __init__(self, root: Path, number: int = 0, fault: str | None = None) -> None:
        self.operations: list[str] = []
        self.fired = False
        self._root, self._number, self._fault = str(root), number, fault
        self._dead = False
        self._lock = threading.RLock()
        self._real: dict[str, Callable[..., Any]] = {}
        self._contents: dict[int, bytes] = {}  # of files by inode, as last fsynced
        self._names: dict[int, dict[str, int]] = {}  # of folders by inode: what each name is, as last fsynced
        self._gone: dict[int, bytes] = {}  # files that have lost their last name
        for folder, folders, files in os.walk(root):
            self._names[os.stat(folder).st_ino] = {name: _inode(folder, name) for name in (*folders, *files)}
            for name in files:
                self._contents[_inode(folder, name)] = Path(folder, name).read_bytes()

    def __enter__(self) -> "Storage":
        for name in ("open", "write", "fsync", "ftruncate", "replace", "rename", "mkdir", "unlink", "rmdir", "link"):
            self._real[name] = getattr(os, name)
            setattr(os, name, self._double_of(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def _double_of(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def double(first: Any, *arguments: Any, **options: Any) -> Any:
            place = self._place(first, options)
            if name == "open":
                flags = arguments[0]
                counts = bool(flags & os.O_CREAT)
            else:
                counts = True
            if not counts or not place.startswith(self._root):
                return real(first, *arguments, **options)
            with self._lock:
                if self._dead:
                    raise Killed
                self.operations.append(name)
                if len(self.operations) == self._number and self._fault is not None:
                    return self._meet(name, real, first, arguments)
                return self._done(name, place, real, first, arguments, options)

        return double

    def _place(self, first: Any, options: dict[str, Any]) -> str:
        if isinstance(first, int):
            return os.readlink(f"/proc/self/fd/{first}")
        folder = options.get("dir_fd") if "dir_fd" in options else options.get("src_dir_fd")
        path = os.fspath(first)
        return path if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)

    def _meet(self, name: str, real: Callable[..., Any], first: Any, arguments: tuple[Any, ...]) -> Any:
        assert self._fault is not None
        if self._fault in WRITE_FAULTS and name != "write":
            return real(first, *arguments)
        self.fired = True
        if self._fault in ERRORS:
            raise OSError(ERRORS[self._fault], os.strerror(ERRORS[self._fault]))
        if self._fault in WRITE_FAULTS:
            written = real(first, bytes(arguments[0])[: max(1, len(bytes(arguments[0])) // 2)])
            if self._fault == "short":
                return written
        self._dead = True
        raise Killed

    def _done(
        self,
        name: str,
        place: str,
        real: Callable[..., Any],
        first: Any,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Any:
        if name in ("replace", "rename") and os.path.isfile(arguments[0]):
            self._gone[os.stat(arguments[0]).st_ino] = Path(arguments[0]).read_bytes()
        if name == "unlink":
            self._gone[os.stat(place).st_ino] = Path(place).read_bytes()
        new = name == "open" and not os.path.exists(place)
        result = real(first, *arguments, **options)
        if new or name == "mkdir":
            inode = os.stat(place).st_ino  # which a file that is gone may have had
            for known in (self._contents, self._names, self._gone):
                known.pop(inode, None)
            if name == "mkdir":
                self._names[inode] = {}
        if name == "fsync" and self.fsyncs:
            inode = os.stat(place).st_ino
            if os.path.isdir(place):
                self._names[inode] = {entry: _inode(place, entry) for entry in os.listdir(place)}
            else:
                self._contents[inode] = Path(place).read_bytes()
        return result

    def left(self, target: Path) -> Path:
        """Writes to `target` what a power cut has left below the root: with "lost data" all names but only fsynced
        bytes, with "lost names" all bytes but only the names of fsynced folders, with "lost both" neither."""
        assert self._fault in CUTS
        now: dict[int, bytes] = dict(self._gone)
        names: dict[int, dict[str, int]] = {}
        for folder, folders, files in os.walk(self._root):
            names[os.stat(folder).st_ino] = {name: _inode(folder, name) for name in (*folders, *files)}
            now |= {_inode(folder, name): Path(folder, name).read_bytes() for name in files}
        contents = now if self._fault == "lost names" else self._contents
        kept = names if self._fault == "lost data" else self._names

        def place(folder: int, path: Path) -> None:
            path.mkdir()
            for name, inode in kept.get(folder, {}).items():
                if inode in names or inode in self._names:
                    place(inode, path / name)
                else:
                    (path / name).write_bytes(contents.get(inode, b""))

        place(os.stat(self._root).st_ino, target)
        return target


def _inode(folder: str, name: str) -> int:
    return os.lstat(os.path.join(folder, name)).st_ino
