"""Shows what a folder of data holds: counts, lengths of documents, and documents decoded."""

import argparse
import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.documents import ReadOptions, list_parts, read_documents
from data_prep.encoding import Encoder, load_tokenizer_info
from data_prep.errors import UserError
from data_prep.manifest import Manifest, read_json, read_manifest
from data_prep.parts import positive_integer
from data_prep.shards import KIND, ShardSet, unigram_entropy

SUMMARY = "Show what a folder of documents, a tokenizer or a shard set holds."
EXAMPLES = """\
  python -m data_prep inspect data/shards --tokenizer data/tokenizer --documents 3
  python -m data_prep inspect data/tokenizer
"""
_BAR_CHARACTERS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="D", help="folder that data_prep has made")
    parser.add_argument(
        "--documents", type=positive_integer, default=2, help="documents to show (default: %(default)s)"
    )
    parser.add_argument(
        "--characters", type=positive_integer, default=300, help="characters of each (default: %(default)s)"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="D", help="tokenizer folder, to show shards as text")


def histogram(lengths: NDArray[np.int64], unit: str) -> str:
    """A text histogram of lengths in powers of two, one bar a line."""
    exponents = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(exponents)
    lines = []
    for exponent in range(int(exponents.min()), len(counts)):
        bar = "█" * round(_BAR_CHARACTERS * counts[exponent] / counts.max())
        lines.append(f"  {2**exponent:>9,} - {2 ** (exponent + 1) - 1:>9,} {unit} {counts[exponent]:>9,} {bar}")
    return "\n".join(lines)


def _excerpt(text: str, characters: int) -> str:
    cut = text[:characters] + ("..." if len(text) > characters else "")
    return "\n".join("  | " + line for line in cut.splitlines())


def _table(content: dict[str, object]) -> str:
    rows = [(key, value) for key, value in content.items() if isinstance(value, int | float | str)]
    return "\n".join(
        f"  {key:<22} {value:,}" if not isinstance(value, str) else f"  {key:<22} {value}" for key, value in rows
    )


def inspect_shards(folder: Path, manifest: Manifest, tokenizer: Path | None, documents: int, characters: int) -> None:
    shards = ShardSet.open(folder)
    mapped = [shards.shard(index) for index in range(len(shards.names))]
    lengths = np.concatenate([np.diff(shard.document_offsets) for shard in mapped])
    print(_table({**manifest.content, "shards": len(mapped), "tokenizer": shards.tokenizer_fingerprint[:12]}))
    print(f"  {'unigram entropy':<22} {unigram_entropy(shards):.3f} nats a token")
    print("\ndocuments by length:\n" + histogram(lengths, "tokens"))
    if tokenizer is not None:
        encoder, info = Encoder(tokenizer), load_tokenizer_info(tokenizer)
        if info.fingerprint != shards.tokenizer_fingerprint:
            raise UserError(
                f"{tokenizer} has fingerprint {info.fingerprint[:12]}, the shards were made with"
                f" {shards.tokenizer_fingerprint[:12]}; name the tokenizer that made them"
            )
        chosen = np.linspace(0, len(lengths) - 1, min(documents, len(lengths))).astype(int)
        bounds = np.cumsum([0, *shards.documents])
        for number in chosen:
            shard = int(np.searchsorted(bounds, number, side="right")) - 1
            ids = mapped[shard].document(int(number - bounds[shard]))
            print(f"\ndocument {number - bounds[shard]} of shard {shards.names[shard]}, {len(ids):,} tokens:")
            print(_excerpt(encoder.decode(ids[:-1]), characters))


def main(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder
    manifest = read_manifest(folder)
    print(f"{folder}: {manifest.kind}, made by {manifest.job.get('command', 'another program')}")
    if manifest.kind == KIND:
        inspect_shards(folder, manifest, arguments.tokenizer, arguments.documents, arguments.characters)
        return
    print(_table(manifest.content))
    if manifest.kind == "documents":
        names = [str(folder / name) for name in manifest.files]
        stream = (
            text for part in list_parts(names, ReadOptions(part_bytes=1 << 40)) for text, _ in read_documents(part)
        )
        for number, text in enumerate(itertools.islice(stream, arguments.documents)):
            print(f"\ndocument {number}, {len(text):,} characters:\n{_excerpt(text, arguments.characters)}")
    if manifest.kind == "tokenizer":
        vocabulary = read_json(folder / "tokenizer.json")["model"]["vocab"]
        pieces = list(vocabulary) if isinstance(vocabulary, dict) else [piece for piece, _ in vocabulary]
        print("  longest pieces         " + "  ".join(map(repr, sorted(pieces, key=len)[-8:])))
