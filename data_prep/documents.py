"""Documents of any input, in parts that do not depend on one another.

A part is a stretch of one input: bytes of a plain JSONL file, row groups of a Parquet file, rows of a data set, or a
whole file of the other kinds. The parts follow from the inputs and `ReadOptions` alone, so that whatever is made of
them is the same however many workers there are. What cannot be read is named and skipped, never fatal here.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from data_prep import files
from data_prep.errors import UserError
from data_prep.files import InputFile

JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
REJECTED_NAME = "rejected.jsonl"
DEFAULT_PART_MEGABYTES = 64
DEFAULT_DOCUMENT_MEGABYTES = 64

MALFORMED, TOO_LONG, DAMAGED, EMPTY = "malformed", "too long", "damaged", "empty"
"""Categories of rejections. Documents without text are no fault of the input; the others are."""
_REJECTIONS_KEPT = 2_500  # of each category and part


def _suffixes(*endings: str) -> tuple[str, ...]:
    return (*endings, *(f"{ending}{packed}" for ending in endings for packed in files.COMPRESSIONS))


KINDS: dict[str, tuple[str, ...]] = {
    "jsonl": _suffixes(*JSONL_SUFFIXES),
    "parquet": (".parquet",),
    "text": _suffixes(".txt"),
    "csv": _suffixes(".csv", ".tsv"),
    "arrow": (".arrow", ".feather"),
    "warc": _suffixes(".warc", ".wet"),
}
"""Kind of file -> how its names end."""


@dataclass(frozen=True)
class Part:
    """A stretch [start, end) of one input, in the units of its kind; `bytes` is its share of the input's size.

    The units are bytes of plain JSONL, row groups of Parquet, record batches of Arrow files, rows of a data set on disk
    and shards of one that streams. Other files are one part each, and end at -1.
    """

    path: str
    start: int
    end: int
    bytes: int

    @property
    def place(self) -> str:
        """Its file, and for a later part file@start: what lines are counted from."""
        return f"{self.path}@{self.start}" if self.start else self.path


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read; its repr identifies it.

    text_field, id_field: keys (JSON) or columns (Parquet, CSV, Arrow) of the text and of the document's name.
    part_bytes: size of the parts that inputs are cut into.
    fields: whether batches carry the documents' other fields too.
    max_document_bytes: a longer document is rejected.
    text_documents: what a document of a .txt file is, the "file" or a "paragraph" (set off by blank lines).
    """

    text_field: str = "text"
    id_field: str = "id"
    part_bytes: int = DEFAULT_PART_MEGABYTES * 1_000_000
    fields: bool = False
    max_document_bytes: int = DEFAULT_DOCUMENT_MEGABYTES * 1_000_000
    text_documents: str = "file"

    @staticmethod
    def of(arguments: argparse.Namespace, *, fields: bool = False) -> "ReadOptions":
        """From the flags of `add_input_arguments`."""
        return ReadOptions(
            text_field=arguments.text_field,
            id_field=arguments.id_field,
            part_bytes=getattr(arguments, "part_bytes", DEFAULT_PART_MEGABYTES * 1_000_000),
            fields=fields,
            max_document_bytes=arguments.max_document_bytes,
            text_documents=arguments.text_documents,
        )


@dataclass
class Rejections:
    """What could not be read of one part: file, line (or row), category and reason of each.

    records: the first 2,500 of each category. In a later part of a file their "file" is file@start and their lines
        count from there, until `number_lines` has the counts of the parts before.
    categories: documents of each category, all of them.
    lines: lines (or rows) that start in the part; the reader tells when it is through.
    """

    part: Part
    records: list[dict[str, Any]] = field(default_factory=list)
    categories: dict[str, int] = field(default_factory=dict)
    lines: int = 0

    def add(self, line: int, category: str, reason: str, documents: int = 1) -> None:
        """line: from 1, counted from the beginning of the part; documents: how many are lost there."""
        before = self.categories.get(category, 0)
        self.categories[category] = before + documents
        if before < _REJECTIONS_KEPT:
            self.records.append({"file": self.part.place, "line": line, "category": category, "reason": reason})


def number_lines(parts: Sequence[Part], summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts' summaries with all lines counted from the beginning of their files, also those in samples' places.

    parts, summaries: all of a job, in their order; each summary has the part's "lines" (`Rejections.lines`). So a line
    in the middle of a terabyte has its number, and nothing was read twice for it.
    """
    numbered, before, path = [], 0, ""
    for part, summary in zip(parts, summaries, strict=True):
        if part.path != path:
            before, path = 0, part.path
        numbered.append(_moved(summary, part, before) if part.start else summary)
        before += summary.get("lines", 0)
    return numbered


def _moved(value: Any, part: Part, lines: int) -> Any:
    """`value` with `lines` added wherever a record or a sample names a line of `part`."""
    if isinstance(value, list):
        return [_moved(item, part, lines) for item in value]
    if not isinstance(value, dict):
        return value
    moved = {key: _moved(item, part, lines) for key, item in value.items()}
    if value.get("file") == part.place and "line" in value:
        moved |= {"file": part.path, "line": value["line"] + lines}
    if isinstance(place := value.get("place"), str) and place.startswith(f"{part.place}:"):
        moved["place"] = f"{part.path}:{int(place.removeprefix(f'{part.place}:')) + lines}"
    return moved


def utf8_length(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


@dataclass
class Batch:
    """Consecutive documents of one part, about two megabytes of text.

    texts: the documents' texts [documents], at least one; none is blank.
    fields: their other fields, the id included, where `ReadOptions.fields` asks for them; empty dicts otherwise.
    lines: line (JSONL, CSV, text) or row of each, from 1, counted from the beginning of the part [documents].
    consumed: bytes of input read since the last batch.
    """

    part: Part
    texts: list[str]
    fields: list[dict[str, Any]]
    lines: list[int]
    consumed: int
    _utf8: list[bytes] | None = field(default=None, repr=False, compare=False)
    _sizes: list[int] | None = field(default=None, repr=False, compare=False)

    def utf8(self) -> list[bytes]:
        """The bytes of each text, encoded once [documents]."""
        if self._utf8 is None:
            self._utf8 = [text.encode() for text in self.texts]
        return self._utf8

    def sizes(self) -> list[int]:
        """Bytes of each text in UTF-8, measured once [documents]."""
        if self._sizes is None:
            self._sizes = list(map(utf8_length, self.texts) if self._utf8 is None else map(len, self._utf8))
        return self._sizes

    def json_lines(self, text_field: str) -> Iterator[bytes]:
        """Each document as a line of JSON, newline included: its other fields, and its text as `text_field`."""
        for text, fields in zip(self.texts, self.fields, strict=True):
            yield orjson.dumps({**fields, text_field: text}, option=orjson.OPT_APPEND_NEWLINE)

    def place(self, index: int) -> str:
        """Where document `index` came from: file:line, or in a later part file@start:line (see `number_lines`)."""
        return f"{self.part.place}:{self.lines[index]}"

    def select(self, kept: Sequence[int]) -> "Batch":
        """The documents at the indices `kept`."""
        return Batch(
            self.part,
            [self.texts[i] for i in kept],
            [self.fields[i] for i in kept],
            [self.lines[i] for i in kept],
            self.consumed,
        )


def add_input_arguments(parser: argparse.ArgumentParser, *, parts: bool = True) -> None:
    """Adds --input and a flag for each field of `ReadOptions` that a user may set; --part_megabytes with `parts`."""
    from data_prep.parts import megabytes

    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="GLOB",
        help="files or globs, local or of any fsspec address (s3://, gs://, hf://): .jsonl, .parquet, .txt, .csv, .tsv,"
        " .arrow, .feather, .warc, .wet, all but Parquet and Arrow also .gz, .zst, .bz2, .xz; or"
        " dataset:NAME_OR_FOLDER[?split=S&config=C] of the datasets library (default split: train)",
    )
    parser.add_argument("--text_field", default="text", help="JSON key or column of the text (default: %(default)s)")
    parser.add_argument("--id_field", default="id", help="JSON key or column of the id (default: %(default)s)")
    parser.add_argument(
        "--text_documents",
        choices=("file", "paragraph"),
        default="file",
        help="what a document of a .txt file is; paragraphs are set off by blank lines (default: %(default)s)",
    )
    parser.add_argument(
        "--max_document_megabytes",
        dest="max_document_bytes",
        type=megabytes,
        metavar="MB",
        default=str(DEFAULT_DOCUMENT_MEGABYTES),
        help="reject longer documents, in MB (default: %(default)s)",
    )
    if not parts:
        return
    parser.add_argument(
        "--part_megabytes",
        dest="part_bytes",
        type=megabytes,
        metavar="MB",
        default=str(DEFAULT_PART_MEGABYTES),
        help="input that one worker takes at a time, in MB; compressed files are one part each (default: %(default)s)",
    )


def kind_of(name: str) -> str:
    """The kind of an input by its name: a key of KINDS, or "dataset"; raises UserError for others."""
    if files.is_dataset(name):
        return "dataset"
    for kind, suffixes in KINDS.items():
        if name.endswith(suffixes):
            return kind
    known = " ".join(suffixes[0] for suffixes in KINDS.values())
    raise UserError(f"--input {name}: unknown kind of file, expected one of {known} .tsv .ndjson .feather .wet")


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """The inputs that the patterns name, each once, in the order of their names.

    A glob passes over `rejected.jsonl`, what a stage could not read, which stands beside the documents that it left.
    Raises UserError for a pattern that matches nothing or a file of an unknown kind.
    """
    found: set[str] = set()
    for pattern in patterns:
        try:
            matches = [pattern] if files.is_dataset(pattern) else files.expand(pattern)
        except (OSError, ValueError, ImportError) as error:  # no such protocol, its package missing, no access
            raise UserError(f"--input {pattern}: {' '.join(str(error).split())}") from None
        if not matches:
            if os.path.isdir(pattern):
                raise UserError(
                    f"--input {pattern} is a folder: name its files (for example {pattern.rstrip('/')}/*.jsonl),"
                    f" or dataset:{pattern} where it is a data set of the datasets library"
                )
            raise UserError(f"--input {pattern} matches no file")
        for name in matches:
            kind_of(name)
            if name == pattern or os.path.basename(name) != REJECTED_NAME:
                found.add(name)
    return _states(sorted(found))


def _states(names: list[str]) -> list[InputFile]:
    if not any(map(files.is_remote, names)):
        return [_state(name) for name in names]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool:  # each is a request or more
        return list(pool.map(_state, names))


def _state(name: str) -> InputFile:
    try:
        return InputFile.of(name)
    except Exception as error:  # of whatever library serves the address
        raise UserError(f"--input {name}: {' '.join(str(error).split())}") from None


def list_parts(patterns: Sequence[str], options: ReadOptions) -> list[Part]:
    """Cuts the inputs into parts of about `options.part_bytes` bytes, in the order of the files' names.

    Raises UserError as `find_inputs` does.
    """
    parts: list[Part] = []
    for file in find_inputs(patterns):
        kind = kind_of(file.name)
        if kind == "jsonl" and not file.name.endswith(files.COMPRESSIONS):
            for start in range(0, file.bytes, options.part_bytes):
                end = min(start + options.part_bytes, file.bytes)
                parts.append(Part(file.name, start, end, end - start))
        elif kind in ("parquet", "arrow", "dataset"):
            from data_prep import table_readers

            parts += table_readers.cut(file, kind, options)
        else:
            parts.append(Part(file.name, 0, -1, file.bytes))
    return parts


def read_batches(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Batch]:
    """The documents of a part. What is damaged, empty or too long goes to `rejections` and is skipped.

    Raises OSError when the storage fails, UserError when a library for this kind of input is missing.
    """
    from data_prep import readers, table_readers, warc_reader

    read = {
        "jsonl": readers.read_jsonl,
        "text": readers.read_text,
        "csv": readers.read_csv,
        "parquet": table_readers.read_parquet,
        "arrow": table_readers.read_arrow,
        "dataset": table_readers.read_dataset,
        "warc": warc_reader.read_warc,
    }
    return read[kind_of(part.path)](part, options, rejections)


def read_texts(part: Part, options: ReadOptions) -> Iterator[str]:
    """The texts alone of what can be read of a part."""
    for batch in read_batches(part, options, Rejections(part)):
        yield from batch.texts
