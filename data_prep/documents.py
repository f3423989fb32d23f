"""Reading documents: JSONL (plain, .gz, .zst), Parquet and plain text, in parts that do not depend on one another.

A part is a byte range of a plain JSONL file, or a whole file of the other kinds. The parts follow from the inputs
and `part_bytes` alone, so that whatever is made of them is the same however many workers there are.
"""

import argparse
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.errors import UserError

_JSONL = (".jsonl", ".json", ".ndjson")
_COMPRESSED = (".gz", ".zst")
KNOWN_SUFFIXES = (*_JSONL, *(f"{a}{b}" for a in _JSONL for b in _COMPRESSED), ".parquet", ".txt")
DEFAULT_PART_MEGABYTES = 64
_PARQUET_BATCH_ROWS = 256


@dataclass(frozen=True)
class Part:
    """Bytes [start, end) of one input file; `end` is the file's size where a part is a whole file."""

    path: str
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read; its repr identifies it.

    text_field, id_field: keys (JSON) or columns (Parquet, CSV, Arrow) of the text and of the document's name.
    part_bytes: size of the parts that inputs are cut into.
    fields: whether batches carry the documents' other fields too.
    max_document_bytes: a longer document is rejected.
    """

    text_field: str = "text"
    id_field: str = "id"
    part_bytes: int = DEFAULT_PART_MEGABYTES * 1_000_000
    fields: bool = False
    max_document_bytes: int = 256 * 1_000_000


class Rejections:
    """What could not be read of one part: each with file, line (or row) and reason."""

    def __init__(self, path: str) -> None:
        self.records: list[dict[str, Any]] = []
        self._path = path

    def add(self, line: int, reason: str) -> None:
        self.records.append({"file": self._path, "line": line, "reason": reason})


@dataclass
class Batch:
    """Consecutive documents of one part, about a megabyte of text.

    texts: the documents' texts [documents].
    fields: their other fields, the id included, where `ReadOptions.fields` asks for them; empty dicts otherwise.
    lines: line (JSONL, CSV) or row of each in its file, from 1 [documents].
    consumed: bytes of input read since the last batch.
    """

    path: str
    texts: list[str]
    fields: list[dict[str, Any]]
    lines: list[int]
    consumed: int

    def place(self, index: int) -> str:
        """Where document `index` of the batch came from, as file:line."""
        return f"{self.path}:{self.lines[index]}"

    def select(self, kept: Sequence[int]) -> "Batch":
        """The documents at the indices `kept`."""
        return Batch(
            self.path,
            [self.texts[i] for i in kept],
            [self.fields[i] for i in kept],
            [self.lines[i] for i in kept],
            self.consumed,
        )


def read_batches(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Batch]:
    """Interim: to be replaced by the real readers."""
    batch = Batch(part.path, [], [], [], 0)
    size = 0
    for number, (text, consumed) in enumerate(read_documents(part, options.text_field), 1):
        batch.texts.append(text)
        batch.fields.append({})
        batch.lines.append(number)
        batch.consumed += consumed
        size += len(text)
        if size > 1 << 20:
            yield batch
            batch, size = Batch(part.path, [], [], [], 0), 0
    if batch.texts:
        yield batch


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --input and --text_field."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="GLOB",
        help="files or globs of documents: .jsonl (plain, .gz, .zst), .parquet, .txt (one document a file)",
    )
    parser.add_argument(
        "--text_field", default="text", help="JSON key or Parquet column of the text (default: %(default)s)"
    )


def find_inputs(patterns: list[str]) -> list[Path]:
    """The files that the patterns name, each once, in the order of their names.

    Raises UserError for a pattern that matches nothing or a file of an unknown kind.
    """
    found: set[str] = set()
    for pattern in patterns:
        exact = os.path.exists(pattern) or not has_magic(pattern)  # a name may hold brackets itself
        matches = [pattern] if exact else glob(pattern, recursive=True)
        files = [match for match in matches if os.path.isfile(match)]
        if not files:
            kind = "is a folder: name its files" if os.path.isdir(pattern) else "matches no file"
            raise UserError(
                f"--input {pattern} {kind} (for example {pattern.rstrip('/')}/*.jsonl)"
                if os.path.isdir(pattern)
                else f"--input {pattern} {kind}"
            )
        for name in files:
            if not name.endswith(KNOWN_SUFFIXES):
                raise UserError(f"--input {name}: unknown kind of file, expected one of {' '.join(KNOWN_SUFFIXES)}")
        found.update(files)
    return [Path(name) for name in sorted(found)]


def list_parts(inputs: list[str], options: ReadOptions) -> list[Part]:
    """Cuts the inputs into parts of about `part_bytes` bytes, in the order of the files' names.

    Raises UserError as `find_inputs` does.
    """
    parts = []
    part_bytes = options.part_bytes
    for path in find_inputs(inputs):
        size = path.stat().st_size
        if path.name.endswith(_JSONL):
            starts = range(0, size, part_bytes)
            parts += [Part(str(path), start, min(start + part_bytes, size)) for start in starts]
        else:
            parts.append(Part(str(path), 0, size))
    return parts


def read_documents(part: Part, text_field: str = "text") -> Iterator[tuple[str, int]]:
    """Yields (text, bytes of input consumed since the last document) for the documents that start in `part`.

    Raises UserError naming file, line (or row) and reason for a line that is not JSON, lacks `text_field` or is
    not UTF-8, and for a damaged file.
    """
    if part.path.endswith(".parquet"):
        yield from _read_parquet(part, text_field)
    elif part.path.endswith(".txt"):
        yield from _read_text_file(part)
    else:
        yield from _read_jsonl(part, text_field)


def _read_jsonl(part: Part, text_field: str) -> Iterator[tuple[str, int]]:
    compressed = part.path.endswith(_COMPRESSED)
    with open(part.path, "rb") as raw:
        position = part.start
        lines: Iterator[bytes]
        if compressed:
            lines = iter(_decompressed(part.path, raw))
        else:
            # A line belongs to the part that holds its first byte.
            if position:
                raw.seek(position - 1)
                position += len(raw.readline()) - 1
            lines = raw
        number = 0
        try:
            for line in lines:
                if not compressed and position >= part.end:
                    return
                number += 1
                before = position
                position = raw.tell() if compressed else position + len(line)
                if line.isspace():
                    continue
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                    text = record[text_field]
                    if not isinstance(text, str):
                        raise TypeError
                    text.encode()  # JSON can escape lone surrogates, which are no text
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    line_number = number if compressed else _line_number(part.path, before)
                    raise UserError(
                        f"{part.path}:{line_number}: {_reason(error, line, text_field)};"
                        ' expected one JSON object a line such as {"' + text_field + '": "..."};'
                        " mend or remove the line and run the command again"
                    ) from None
                yield text, position - before
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{part.path}: cannot be read to its end after line {number} ({error})") from None


def _reason(error: Exception, line: bytes, text_field: str) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"{text_field!r} holds a lone surrogate at character {error.start}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start} of the line"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    if isinstance(error, KeyError):
        found = ", ".join(sorted(json.loads(line))) or "none"
        return f"no field {text_field!r} (found: {found}; --text_field names another)"
    if isinstance(error, RecursionError):
        return "not JSON of a sane depth"
    found = type(json.loads(line)).__name__
    return f"{text_field!r} is not a string" if found == "dict" else f"a JSON {found}, not an object"


def _decompressed(path: str, raw: BinaryIO) -> io.BufferedIOBase:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    import pyarrow  # brings zstd along; imported late, most inputs do not need it

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))


def _line_number(path: str, offset: int) -> int:
    with open(path, "rb") as file:
        count = 1
        while offset > 0:
            chunk = file.read(min(offset, 1 << 20))
            if not chunk:
                break
            count += chunk.count(b"\n")
            offset -= len(chunk)
    return count


def _read_text_file(part: Part) -> Iterator[tuple[str, int]]:
    content = Path(part.path).read_bytes()
    try:
        yield content.decode(), part.bytes
    except UnicodeDecodeError as error:
        raise UserError(f"{part.path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None


def _read_parquet(part: Part, text_field: str) -> Iterator[tuple[str, int]]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(part.path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise UserError(f"{part.path}: no column {text_field!r} (found: {', '.join(names)})")
            consumed, rows = 0, max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise UserError(f"{part.path}: row {row}: {text_field!r} is not a string")
                    row += 1
                    now = part.bytes * row // rows
                    yield text, now - consumed
                    consumed = now
    except UnicodeDecodeError as error:
        raise UserError(f"{part.path}: row {row}: not UTF-8 at byte {error.start} of {text_field!r}") from None
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{part.path}: not a readable Parquet file ({reason})") from None
