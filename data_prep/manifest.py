"""`manifest.json`: what a folder of data holds, what made it, and the checksum of every file.

A folder without a manifest is unfinished. Documents, tokenizers and token shards all carry one, so one `verify`
serves them all and a rerun knows what is done.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 (hexadecimal) of one file."""

    bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> "FileRecord":
        return FileRecord(path.stat().st_size, durable.sha256_of(path))


@dataclass(frozen=True)
class Manifest:
    """The content of one `manifest.json`.

    kind: "documents", "tokenizer" or "shards".
    job: the command and its options that made the folder; equal jobs make equal folders.
    files: every data file, by its name in the folder.
    content: what else the kind needs (counts, tokenizer fingerprint, dtype, ...).
    """

    kind: str
    job: dict[str, Any]
    files: dict[str, FileRecord]
    content: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        value = asdict(self)
        durable.write_json(folder / MANIFEST_NAME, value | {"sha256": _sha256_of(value)})


def _sha256_of(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path, kind: str | None = None) -> Manifest:
    """Reads `folder`'s manifest.

    Raises UserError when the folder has none, when it is not JSON of a version known here, or when its kind is
    not `kind`.
    """
    path = folder / MANIFEST_NAME
    try:
        raw = json.loads(path.read_bytes())
        manifest = Manifest(
            kind=raw["kind"],
            job=raw["job"],
            files={name: FileRecord(**record) for name, record in raw["files"].items()},
            content=raw["content"],
            format_version=raw["format_version"],
        )
    except (FileNotFoundError, NotADirectoryError):
        wanted = f"a folder of {kind}" if kind else "a data folder"
        raise UserError(f"{path} is missing: expected {wanted} that `python -m data_prep` has finished") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): make the folder anew, or restore it") from None
    if manifest.format_version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {manifest.format_version}, expected {FORMAT_VERSION}")
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{folder} holds {manifest.kind}, expected {kind}")
    return manifest


def read_json(path: Path) -> Any:
    """Reads a JSON file of ours; raises UserError when it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it and make it again") from None


def is_current(folder: Path, job: dict[str, Any], inputs: Iterable[Path]) -> bool:
    """True when `folder` was finished by an equal job after the last change to any of `inputs`."""
    path = folder / MANIFEST_NAME
    try:
        if json.loads(path.read_bytes())["job"] != json.loads(json.dumps(job)):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    finished = path.stat().st_mtime_ns
    return all(os.stat(source).st_mtime_ns <= finished for source in inputs)


def verify_files(folder: Path, manifest: Manifest, report: Callable[[int], object]) -> list[str]:
    """Compares every file, the manifest included, with its record; returns one line a fault (none: all is as it was
    written).

    report: called with the number of bytes checked since the last call.
    """
    faults = []
    raw = read_json(folder / MANIFEST_NAME)
    if raw.pop("sha256", None) != _sha256_of(raw):
        faults.append(f"{folder / MANIFEST_NAME}: content differs from its own sha256")
    for name, record in sorted(manifest.files.items()):
        path = folder / name
        if not path.is_file():
            faults.append(f"{path}: missing")
        elif path.stat().st_size != record.bytes:
            faults.append(f"{path}: {path.stat().st_size} bytes, expected {record.bytes}")
        elif durable.sha256_of(path) != record.sha256:
            faults.append(f"{path}: content differs from its sha256 {record.sha256[:12]}...")
        report(record.bytes)
    return faults
