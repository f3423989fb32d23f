"""Documents to token shards: one shard a part of the input, each made by one worker process."""

import argparse
import time
from pathlib import Path
from typing import Any

from data_prep.documents import (
    DEFAULT_PART_MEGABYTES,
    Part,
    ReadOptions,
    add_input_arguments,
    find_inputs,
    list_parts,
    read_documents,
)
from data_prep.encoding import Encoder, load_tokenizer_info
from data_prep.errors import UserError
from data_prep.manifest import FileRecord, Manifest
from data_prep.parts import Report, add_work_arguments, finish_parts, megabytes, prepare_output, run_parts
from data_prep.shards import KIND, ShardWriter, dtype_for

SUMMARY = "Encode documents with a tokenizer into memory-mapped token shards (Megatron .bin/.idx)."
EXAMPLES = """\
  python -m data_prep tokenize --input 'corpus/*.jsonl.zst' --tokenizer data/tokenizer --output_dir data/shards
  python -m data_prep tokenize --input wiki.parquet --text_field body --tokenizer data/gpt2 --output_dir data/wiki
"""
_BATCH_BYTES = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="D", help="tokenizer folder (tokenizer.json)")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="D", help="folder of the shards")
    parser.add_argument(
        "--part_megabytes",
        dest="part_bytes",
        type=megabytes,
        metavar="MB",
        default=str(DEFAULT_PART_MEGABYTES),
        help="input of one shard in MB; compressed files and Parquet give one shard each (default: %(default)s)",
    )
    add_work_arguments(parser)


def encode_part(
    part: Part, prefix: str, tokenizer: str, text_field: str, end_of_document: int, dtype: str, report: Report
) -> dict[str, Any]:
    """Encodes the documents of one part into the shard `prefix`; returns its counts and file records.

    Every document ends with `end_of_document`; documents without text are left out (and counted as empty).
    Memory is that of 1 MiB of text and its ids, and 4 bytes a document.
    """
    import numpy as np

    encoder = Encoder(Path(tokenizer))
    end = np.array([end_of_document], dtype=dtype)
    texts: list[str] = []
    empty = text_bytes = pending = consumed = 0
    with ShardWriter(Path(prefix), np.dtype(dtype)) as writer:

        def flush() -> None:
            nonlocal texts, pending, consumed
            for ids in encoder.encode_batch(texts):
                writer.append(np.concatenate((ids.astype(dtype, copy=False), end)))
            report(len(texts), consumed)
            texts, pending, consumed = [], 0, 0

        for text, size in read_documents(part, text_field):
            consumed += size
            if not text.strip():
                empty += 1
                continue
            texts.append(text)
            pending += len(text)
            text_bytes += len(text.encode())
            if pending >= _BATCH_BYTES:
                flush()
        flush()
    return {
        "documents": writer.documents,
        "tokens": writer.tokens,
        "text_bytes": text_bytes,
        "empty_documents": empty,
        "files": {name: vars(record) for name, record in writer.files.items()},
    }


def tokenize(
    inputs: list[str],
    tokenizer: Path,
    output_dir: Path,
    *,
    text_field: str = "text",
    part_bytes: int = DEFAULT_PART_MEGABYTES * 1_000_000,
    workers: int = 1,
    overwrite: bool = False,
) -> None:
    """Makes the shard set of the documents in `inputs`; see `add_arguments` for the options.

    Raises UserError for bad input, an unusable tokenizer, or an output folder that holds something else.
    """
    info = load_tokenizer_info(tokenizer)
    dtype = dtype_for(info.vocab_size)
    job = {
        "command": "tokenize",
        "input": inputs,
        "text_field": text_field,
        "tokenizer_fingerprint": info.fingerprint,
        "part_bytes": part_bytes,
    }
    sources = find_inputs(inputs)
    # A file may join the inputs with an old time stamp (mv, cp -p): their number and size belong to the result.
    of_inputs = {"input_files": len(sources), "input_bytes": sum(path.stat().st_size for path in sources)}
    if not prepare_output(output_dir, job | of_inputs, sources, overwrite):
        return
    started = time.monotonic()
    parts = list_parts(inputs, ReadOptions(part_bytes=part_bytes))
    names = [f"{index:06d}" for index in range(len(parts))]
    results = run_parts(
        encode_part,
        [
            (
                part,
                str(output_dir / name),
                str(tokenizer),
                text_field,
                info.special.end_of_document,
                dtype.str,
            )
            for part, name in zip(parts, names, strict=True)
        ],
        part_inputs=[[part.path] for part in parts],
        part_bytes=[part.bytes for part in parts],
        output_dir=output_dir,
        job=job,
        workers=workers,
        description="tokenize",
    )
    documents = sum(result["documents"] for result in results)
    shards = [
        {"name": name, "documents": result["documents"], "tokens": result["tokens"]}
        for name, result in zip(names, results, strict=True)
        if result["documents"]  # a part may hold none: only blank documents, or the middle of one long line
    ]
    kept = {shard["name"] for shard in shards}
    for path in [*output_dir.glob("*.idx"), *output_dir.glob("*.bin")]:
        if path.stem not in kept:  # also those of an earlier, killed run over more parts
            path.unlink()
    if documents == 0:
        finish_parts(output_dir)
        raise UserError(f"the input holds no text: {len(sources)} files such as {sources[0]}, 0 documents with text")
    tokens = sum(result["tokens"] for result in results)
    text_bytes = sum(result["text_bytes"] for result in results)
    Manifest(
        kind=KIND,
        job=job | of_inputs,
        files={
            name: FileRecord(**record)
            for result in results
            for name, record in result["files"].items()
            if result["documents"]
        },
        content={
            "documents": documents,
            "tokens": tokens,
            "text_bytes": text_bytes,
            "empty_documents": sum(result["empty_documents"] for result in results),
            "dtype": dtype.name,
            "tokenizer": {
                "fingerprint": info.fingerprint,
                "vocab_size": info.vocab_size,
                "end_of_document": info.special.end_of_document,
            },
            "shards": shards,
        },
    ).write(output_dir)
    finish_parts(output_dir)
    seconds = time.monotonic() - started
    print(
        f"{output_dir}: {documents:,} documents, {tokens:,} tokens ({text_bytes / tokens:.2f} bytes a token) in"
        f" {len(shards)} shards of {dtype.name}; {seconds:.1f} s, {text_bytes / 1e6 / seconds:.1f} MB/s"
    )


def main(arguments: argparse.Namespace) -> None:
    tokenize(
        arguments.input,
        arguments.tokenizer,
        arguments.output_dir,
        text_field=arguments.text_field,
        part_bytes=arguments.part_bytes,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
