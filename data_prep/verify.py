"""Checks every byte of a folder of data against its manifest, and what checksums cannot see besides."""

import argparse
import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_prep import durable, mix
from data_prep.errors import UserError
from data_prep.manifest import MANIFEST_NAME, FileRecord, Manifest, read_json, read_manifest
from data_prep.parts import PARTS_FOLDER, available_cores, positive_integer
from data_prep.plan import PLAN_NAME, plan_fault
from data_prep.progress import progress_bar
from data_prep.shards import KIND, ShardSet, is_foreign

SUMMARY = "Check every file of a data folder against its manifest; exits 1 and names each file that is not whole."
EXAMPLES = """\
  python -m data_prep verify data/shards
  python -m data_prep verify data/documents data/tokenizer data/mixture
"""
_PLANS_FOLDER = "samples"
_CHUNK_BYTES = 1 << 20
_SLICE = 1 << 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="D", help="folders that data_prep has made")
    parser.add_argument(
        "--workers",
        type=positive_integer,
        metavar="N",
        default=available_cores(),
        help="files read at a time (default: the cores, %(default)s here)",
    )


def file_faults(folder: Path, manifest: Manifest, report: Callable[[int], object], workers: int = 1) -> list[str]:
    """Compares every file with its record, `workers` files at a time; one line a fault, by the files' names.

    report: called with the number of bytes read since the last call, by one thread at a time.
    """
    lock = threading.Lock()

    def locked_report(size: int) -> None:
        with lock:
            report(size)

    # The longest first, so that no thread is left with one at the end.
    order = sorted(manifest.files, key=lambda name: -manifest.files[name].bytes)
    with ThreadPoolExecutor(workers) as threads:  # sha256 gives up the interpreter lock
        faults = threads.map(lambda name: _file_fault(folder / name, manifest.files[name], locked_report), order)
        found = dict(zip(order, faults, strict=True))
    return [fault for name in sorted(found) if (fault := found[name])]


def manifest_faults(folder: Path) -> list[str]:
    """Whether `manifest.json` is, byte for byte, what was written: no checksum of a value sees its white space."""
    path = folder / MANIFEST_NAME
    raw = read_json(path)
    value = {key: item for key, item in raw.items() if key != "sha256"}
    own = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    if raw.get("sha256") != own or path.read_bytes() != durable.json_bytes(raw):
        return [f"{path}: content differs from its own sha256"]
    return []


def _file_fault(path: Path, record: FileRecord, report: Callable[[int], None]) -> str | None:
    try:
        size = path.stat().st_size
        if size != record.bytes:
            report(record.bytes)
            return f"{path}: {size} bytes, expected {record.bytes}"
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                report(len(chunk))
    except FileNotFoundError:
        report(record.bytes)
        return f"{path}: missing"
    except OSError as error:  # a bad sector ends neither the others' check nor their being named
        return f"{path}: cannot be read ({error.strerror})"
    if digest.hexdigest() != record.sha256:
        return f"{path}: content differs from its sha256 {record.sha256[:12]}..."
    return None


def shard_faults(folder: Path, manifest: Manifest) -> list[str]:
    """What checksums cannot see: ids beyond the vocabulary, documents that do not end, counts that disagree.

    Reads through memory maps, 16 Mi tokens at a time.
    """
    faults = []
    shards = ShardSet.open(folder)
    assert shards.vocab_size is not None
    for index in range(len(shards.names)):
        try:
            shard = shards.shard(index)
        except UserError as error:
            faults.append(str(error))
            continue
        if fault := shard.fault():
            faults.append(fault)
            continue
        slices = [shard.tokens[start : start + _SLICE] for start in range(0, len(shard.tokens), _SLICE)]
        smallest = min((int(tokens.min()) for tokens in slices), default=0)
        largest = max((int(tokens.max()) for tokens in slices), default=0)
        for extreme in (smallest, largest):
            if not 0 <= extreme < shards.vocab_size:
                faults.append(f"{shard.path}: holds id {extreme}, the vocabulary has {shards.vocab_size}")
        offsets = shard.document_offsets
        ends = offsets[1:] - 1
        if np.any(ends < offsets[:-1]) or not np.all(shard.tokens[ends] == shards.end_of_document):
            faults.append(f"{shard.path}: a document does not end with id {shards.end_of_document}")
    if (sum(shards.documents), sum(shards.tokens)) != (
        manifest.content["documents"],
        manifest.content["tokens"],
    ):
        faults.append(f"{folder}: the shards' counts do not add up to the manifest's")
    return faults


def plan_faults(folder: Path) -> list[str]:
    """Plans in `samples/` that do not follow from the shards: a plan is a pure function, so it is made again.

    Raises UserError when the shards themselves cannot be read.
    """
    paths = _plans(folder)
    if not paths:
        return []
    shards = ShardSet.open(folder)
    return [fault for path in paths if (fault := plan_fault(shards, path))]


def _plans(folder: Path) -> list[Path]:
    return sorted(path.parent for path in (folder / _PLANS_FOLDER).glob(f"*/{PLAN_NAME}"))


def uncovered(folder: Path, manifest: Manifest | None) -> list[Path]:
    """Files below `folder` that nothing here checks, sorted; they are no part of the data set."""
    if manifest is None:
        checked = {folder / name for pattern in ("*.bin", "*.idx") for name in (p.name for p in folder.glob(pattern))}
    else:
        checked = {folder / MANIFEST_NAME, *(folder / name for name in manifest.files)}
    if manifest is None or manifest.kind == KIND:
        checked |= {path for plan in _plans(folder) for path in plan.iterdir()}
        checked |= set((folder / _PLANS_FOLDER).glob("*.svg"))  # drawn by `pack`, read by people
    found = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return sorted(path for path in found if path not in checked and PARTS_FOLDER not in path.relative_to(folder).parts)


def verify(folder: Path, workers: int = 1) -> Manifest:
    """Raises UserError naming every fault of `folder`; returns its manifest when there is none."""
    manifest = read_manifest(folder)
    if faults := manifest_faults(folder):  # its records say nothing of the other files then
        raise UserError(_message(folder, faults))
    with progress_bar(f"verify {folder}", sum(record.bytes for record in manifest.files.values())) as bar:
        faults = file_faults(folder, manifest, bar.update, workers)
    if manifest.kind == KIND:
        # Damaged shards would show a second time, as what does not follow from them.
        faults = faults or shard_faults(folder, manifest) or plan_faults(folder)
    if manifest.kind == mix.KIND and not faults:
        faults = mix.component_faults(folder)
    if faults:
        raise UserError(_message(folder, faults))
    return manifest


def _message(folder: Path, faults: list[str]) -> str:
    return f"{folder}: {len(faults)} {'fault' if len(faults) == 1 else 'faults'}\n  " + "\n  ".join(faults)


def _verify_foreign(folder: Path) -> str:
    shards = ShardSet.open(folder)
    if faults := plan_faults(folder):
        raise UserError(_message(folder, faults))
    return (
        f"{folder}: {len(shards.names)} shards of another program, {sum(shards.documents):,} documents,"
        f" {sum(shards.tokens):,} tokens: indexes and sizes fit together; there is no {MANIFEST_NAME}, so no"
        " checksum to compare any byte with"
    )


def _described(folder: Path, manifest: Manifest) -> str:
    if manifest.kind == mix.KIND:
        return f"mixture of {len(mix.read_mixture(folder).components)} shard sets (verify them, too, for their bytes)"
    size = sum(record.bytes for record in manifest.files.values())
    plans = len(_plans(folder)) if manifest.kind == KIND else 0
    return f"{manifest.kind}, {len(manifest.files)} files, {size:,} bytes" + (f", {plans} plans" if plans else "")


def main(arguments: argparse.Namespace) -> None:
    faults = []
    for folder in arguments.folders:
        try:
            if is_foreign(folder):
                manifest = None
                print(_verify_foreign(folder))
            else:
                manifest = verify(folder, arguments.workers)
                print(f"{folder}: {_described(folder, manifest)}, all as they were written")
        except UserError as error:  # the folders after it are checked all the same
            faults.append(str(error))
            continue
        if others := uncovered(folder, manifest):
            print(f"  not part of it, not checked: {len(others)} files, such as {others[0]}")
    if faults:
        raise UserError("\n".join(faults))
