"""Checks every byte of a folder of data against its manifest, and a shard set's structure besides."""

import argparse
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.manifest import Manifest, read_manifest, verify_files
from data_prep.parts import progress_bar
from data_prep.shards import KIND, ShardSet

SUMMARY = "Check every file of a data folder against its manifest; exits 1 and names each file that is not whole."
EXAMPLES = """\
  python -m data_prep verify data/shards
  python -m data_prep verify data/documents data/tokenizer
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="D", help="folders that data_prep has made")


def shard_faults(folder: Path, manifest: Manifest) -> list[str]:
    """What checksums cannot see: ids beyond the vocabulary, documents that do not end, counts that disagree."""
    faults = []
    shards = ShardSet.open(folder)
    for index in range(len(shards.names)):
        try:
            shard = shards.shard(index)
        except UserError as error:
            faults.append(str(error))
            continue
        for extreme in (shard.tokens.min(initial=0), shard.tokens.max(initial=0)):
            if not 0 <= extreme < shards.vocab_size:
                faults.append(f"{shard.path}: holds id {extreme}, the vocabulary has {shards.vocab_size}")
        ends = shard.document_offsets[1:] - 1
        if not np.all(shard.tokens[ends] == shards.end_of_document):
            faults.append(f"{shard.path}: a document does not end with id {shards.end_of_document}")
    if (sum(shards.documents), sum(shards.tokens)) != (
        manifest.content["documents"],
        manifest.content["tokens"],
    ):
        faults.append(f"{folder}: the shards' counts do not add up to the manifest's")
    return faults


def verify(folder: Path) -> Manifest:
    """Raises UserError naming every fault of `folder`; returns its manifest when there is none."""
    manifest = read_manifest(folder)
    with progress_bar(f"verify {folder}", sum(record.bytes for record in manifest.files.values())) as bar:
        faults = verify_files(folder, manifest, bar.update)
    if manifest.kind == KIND and not faults:
        faults = shard_faults(folder, manifest)
    if faults:
        raise UserError(
            f"{folder}: {len(faults)} of {len(manifest.files)} files are not whole; make them again\n  "
            + "\n  ".join(faults)
        )
    return manifest


def main(arguments: argparse.Namespace) -> None:
    for folder in arguments.folders:
        manifest = verify(folder)
        size = sum(record.bytes for record in manifest.files.values())
        print(f"{folder}: {manifest.kind}, {len(manifest.files)} files, {size:,} bytes, all as they were written")
