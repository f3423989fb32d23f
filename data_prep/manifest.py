"""`manifest.json`: what a folder of data holds, what made it, and the checksum of every file.

A folder without a manifest is unfinished. Documents, tokenizers and token shards all carry one, so one `verify`
serves them all and a rerun knows what is done.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.errors import UserError
from data_prep.files import InputFile, is_dataset, is_remote

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
    job: the command and its options that made the folder, and under "inputs" what it read; equal jobs make equal
        folders.
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


def describe_inputs(inputs: Iterable[InputFile]) -> dict[str, Any]:
    """What a manifest keeps of the files that a job read, as `job["inputs"]`: number, bytes, and a sha256.

    The sha256 is over name and size of each, and over the version (entity tag, commit) of those that are not local
    files. Local modification times are compared with the manifest's own.
    """
    files = sorted(inputs, key=lambda file: file.name)
    versions = [(file.name, file.bytes, None if _is_local(file) else file.changed) for file in files]
    return {
        "files": len(files),
        "bytes": sum(file.bytes for file in files),
        "sha256": hashlib.sha256(repr(versions).encode()).hexdigest(),
    }


def _is_local(file: InputFile) -> bool:
    return not is_remote(file.name) and not is_dataset(file.name)


def is_current(folder: Path, job: dict[str, Any], inputs: Iterable[InputFile]) -> bool:
    """True when `folder` was finished by an equal job after the last change to any of `inputs`.

    A manifest without `job["inputs"]`, as older ones are, knows nothing of remote inputs: it is not current then.
    """
    inputs = list(inputs)
    path = folder / MANIFEST_NAME
    try:
        finished_job = json.loads(path.read_bytes())["job"]
        finished = path.stat().st_mtime_ns
        known = finished_job.pop("inputs", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    expected = json.loads(json.dumps(job))
    expected.pop("inputs", None)
    if finished_job != expected or (known is not None and known != describe_inputs(inputs)):
        return False
    local = [file for file in inputs if _is_local(file)]
    return (known is not None or len(local) == len(inputs)) and all(file.changed <= finished for file in local)


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
