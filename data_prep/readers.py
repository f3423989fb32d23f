"""Readers of lines: JSON lines, plain text, CSV. Each turns a part into batches and names what it had to skip.

`table_readers` and `warc_reader` hold the others. A fault of the data is a rejection; one of the storage an OSError.
"""

import codecs
import csv
import itertools
import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

import orjson

from data_prep import files
from data_prep.documents import DAMAGED, EMPTY, MALFORMED, TOO_LONG, Batch, Part, ReadOptions, Rejections
from data_prep.files import COMPRESSIONS

_BATCH_BYTES = 1 << 21
_BLOCK_BYTES = 1 << 20

Document = tuple[int, str, dict[str, Any], int]
"""(line or row, text, other fields, bytes of input consumed since the last one)"""


class Lines:
    """The lines that start in a part, each with its newline; None stands for one that was too long to be kept.

    Memory is that of the longest line allowed: of a longer one nothing is kept. Once through, the part's rejections
    know how many lines there were.

    number: of the line given last, from 1.
    quotes_dropped: double quotes in the line that was last too long.
    """

    def __init__(self, part: Part, options: ReadOptions, rejections: Rejections) -> None:
        self.number = 0
        self._part, self._limit, self._rejections = part, options.max_document_bytes, rejections
        self._position = self._told = part.start
        self.quotes_dropped = 0

    def consumed(self) -> int:
        """Bytes of input read since the last call."""
        told, self._told = self._told, self._position
        return self._position - told

    def __iter__(self) -> Iterator[bytes | None]:
        part = self._part
        with files.Watched(part.path) as file:
            try:
                stream = files.buffered(part.path, file)
                if part.path.endswith(COMPRESSIONS):
                    yield from self._compressed(stream, file)
                else:
                    yield from self._plain(stream)
            except files.DECOMPRESSION_ERRORS as error:
                file.raise_failure()
                self._rejections.add(self.number + 1, DAMAGED, damage(error))
        self._rejections.lines = self.number

    def _plain(self, stream: BinaryIO) -> Iterator[bytes | None]:
        mark = 0
        if self._part.start:  # a line belongs to the part that holds its first byte
            stream.seek(self._part.start - 1)
            self._position += _skip_line(stream)[0] - 1
        else:
            mark = _skip_mark(stream)  # which is of the first line
        end = self._part.end if self._part.end >= 0 else sys.maxsize
        limit = self._limit
        while self._position < end and (line := stream.readline(limit + 1)):
            self.number += 1
            self._position += len(line) + mark
            mark = 0
            yield line if len(line) <= limit else self._checked(line, stream)

    def _compressed(self, stream: BinaryIO, file: files.Watched) -> Iterator[bytes | None]:
        _skip_mark(stream)
        limit = self._limit
        for line in iter(partial(stream.readline, limit + 1), b""):
            self.number += 1
            self._position = file.bytes_read
            yield line if len(line) <= limit else self._checked(line, stream)
        self._position = file.bytes_read

    def _checked(self, line: bytes, stream: BinaryIO) -> bytes | None:
        """`line`, longer than the limit, if only by its newline; otherwise it is named, read over, and None given."""
        if line.endswith(b"\n"):
            return line
        skipped, quotes = _skip_line(stream)
        self.quotes_dropped = line.count(b'"') + quotes
        if not self._part.path.endswith(COMPRESSIONS):
            self._position += skipped
        self._rejections.add(self.number, TOO_LONG, too_long(len(line) + skipped, self._limit))
        return None


def _skip_line(stream: BinaryIO) -> tuple[int, int]:
    """Reads to the end of the line without keeping it: (its bytes, its double quotes)."""
    size = quotes = 0
    for piece in iter(partial(stream.readline, _BLOCK_BYTES), b""):
        size += len(piece)
        quotes += piece.count(b'"')
        if piece.endswith(b"\n"):
            break
    return size, quotes


def _skip_mark(stream: Any) -> int:
    """Reads over a byte order mark; returns its bytes."""
    return len(stream.read(3)) if stream.peek(3)[:3] == codecs.BOM_UTF8 else 0


def damage(error: BaseException) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    truncated = isinstance(error, EOFError) or "truncated" in reason.lower()
    return f"{'truncated' if truncated else 'damaged'}: cannot be read from here on ({reason})"


def too_long(size: int, limit: int) -> str:
    return f"{size:,} bytes, longer than the {limit:,} of --max_document_megabytes"


# --- JSON lines


class _RejectedError(Exception):
    """(category, reason) of a line that is no document."""


def read_jsonl(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Batch]:
    """A line a document. Blank lines are passed over."""
    name, keep_fields, loads = options.text_field, options.fields, orjson.loads
    lines = Lines(part, options, rejections)
    batch, size = Batch(part, [], [], [], 0), 0
    for line in lines:
        if line is None:
            continue
        try:
            fields = loads(line)
            text = fields.pop(name)
            if text.isspace() or not text:
                raise KeyError
        except (ValueError, KeyError, TypeError, AttributeError):
            if line.isspace():
                continue
            try:
                text, fields = _second_look(line, name)
            except _RejectedError as rejected:
                category, reason = rejected.args
                rejections.add(lines.number, category, reason)
                continue
        batch.texts.append(text)
        batch.fields.append(fields if keep_fields else {})
        batch.lines.append(lines.number)
        size += len(line)
        if size >= _BATCH_BYTES:
            batch.consumed = lines.consumed()
            yield batch
            batch, size = Batch(part, [], [], [], 0), 0
    if batch.texts:
        batch.consumed = lines.consumed()
        yield batch


def _second_look(line: bytes, name: str) -> tuple[str, dict[str, Any]]:
    """(text, other fields) of a line that orjson or the plain key did not serve; raises _RejectedError with its fault.

    Served here are NaN and Infinity, which Python writes and JSON does not know, a byte order mark inside a file
    (files put one after another) and names such as "a.b".
    """
    try:
        record = json.loads(line.rstrip(b"\r\n").decode().removeprefix("\ufeff"))
        if not isinstance(record, dict):
            raise _RejectedError(MALFORMED, f"a JSON {type(record).__name__}, not an object")
        json.dumps(record, ensure_ascii=False).encode()  # fails for a lone surrogate, anywhere
    except UnicodeEncodeError:
        raise _RejectedError(MALFORMED, "holds a lone surrogate, which is no text") from None
    except UnicodeDecodeError as error:
        raise _RejectedError(MALFORMED, f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise _RejectedError(MALFORMED, f"not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError):
        raise _RejectedError(MALFORMED, "not JSON of a sane depth or range") from None
    path = [name] if name in record else name.split(".")
    holder: Any = record
    for key in path[:-1]:
        holder = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(holder, dict) or path[-1] not in holder:
        found = ", ".join(sorted(record)) or "none"
        raise _RejectedError(MALFORMED, f"no field {name!r} (found: {found}; --text_field names another)")
    text = holder.pop(path[-1])
    if not isinstance(text, str):
        raise _RejectedError(MALFORMED, f"{name!r} is not a string")
    if not text or text.isspace():
        raise _RejectedError(EMPTY, "empty document")
    return text, record


# --- documents that come one by one


def batched(part: Part, documents: Iterator[Document], options: ReadOptions, rejections: Rejections) -> Iterator[Batch]:
    """Batches of about two megabytes of text; empty and too long documents are rejected on the way."""
    limit = options.max_document_bytes
    batch, size = Batch(part, [], [], [], 0), 0
    for line, text, fields, consumed in documents:
        batch.consumed += consumed
        if not text or text.isspace():
            rejections.add(line, EMPTY, "empty document")
            continue
        if len(text) * 4 > limit and (length := len(text.encode())) > limit:
            rejections.add(line, TOO_LONG, too_long(length, limit))
            continue
        batch.texts.append(text)
        batch.fields.append(fields)
        batch.lines.append(line)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = Batch(part, [], [], [], 0), 0
    if batch.texts:
        yield batch


# --- plain text


def read_text(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Batch]:
    """A document a file, or a paragraph, which blank lines set off. The id is the file's name, or name:line."""
    read = _paragraphs if options.text_documents == "paragraph" else _whole_file
    yield from batched(part, read(part, options, rejections), options, rejections)


def _whole_file(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Document]:
    limit = options.max_document_bytes
    with files.Watched(part.path) as file:
        try:
            content = files.buffered(part.path, file).read(limit + len(codecs.BOM_UTF8) + 1)
        except files.DECOMPRESSION_ERRORS as error:
            file.raise_failure()
            rejections.add(1, DAMAGED, damage(error))
            return
    content = content.removeprefix(codecs.BOM_UTF8)
    if len(content) > limit:
        advice = "" if options.text_documents == "paragraph" else " (--text_documents paragraph divides a file)"
        rejections.add(1, TOO_LONG, f"longer than the {limit:,} bytes of --max_document_megabytes{advice}")
        return
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        rejections.add(line, MALFORMED, f"not UTF-8 at byte {error.start} of the file")
        return
    yield 1, text, {options.id_field: part.path} if options.fields else {}, part.bytes


def _paragraphs(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Document]:
    """Runs of lines that are not blank, each without its last newline."""
    lines = Lines(part, options, rejections)
    paragraph: list[bytes] = []
    start, size, spoiled = 1, 0, False
    for line in itertools.chain(lines, [b""]):
        if line is None:
            spoiled = True
        elif line and not line.isspace():
            if not paragraph and not spoiled:
                start = lines.number
            size += len(line)
            if size <= options.max_document_bytes:
                paragraph.append(line)
        else:
            if size > options.max_document_bytes and not spoiled:
                rejections.add(start, TOO_LONG, too_long(size, options.max_document_bytes))
            elif paragraph and not spoiled:
                content = b"".join(paragraph).rstrip(b"\r\n")
                fields = {options.id_field: f"{part.path}:{start}"} if options.fields else {}
                try:
                    yield start, content.decode(), fields, lines.consumed()
                except UnicodeDecodeError as error:
                    bad = start + content.count(b"\n", 0, error.start)
                    rejections.add(bad, MALFORMED, f"not UTF-8 at byte {error.start} of the paragraph")
            paragraph, size, spoiled = [], 0, False


# --- CSV


class _RowTooLongError(Exception):
    """Ends a row that has grown beyond the longest document."""


class _RowLines:
    """The lines of a CSV file for `csv.reader`, which asks for as many as a row has; bounds what one row may take.

    named: whether the row's fault has been named already; not_utf8: whether it holds such a line.
    """

    def __init__(self, lines: Lines, limit: int) -> None:
        self._lines, self._given, self._limit = lines, iter(lines), limit
        self.begin_row()

    def begin_row(self) -> None:
        self._size = 0
        self.named = self.not_utf8 = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._given)
        if line is None or self._size + len(line) > self._limit + 1:
            self.named = line is None
            self._skip_row(line, quoted=self._size > 0)
            raise _RowTooLongError
        self._size += len(line)
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.not_utf8 = True
            return line.decode("utf-8", "replace")

    def _skip_row(self, line: bytes | None, quoted: bool) -> None:
        """Reads over the rest of a row: to the line at whose end no quote is open. quoted: whether one was before."""
        while True:
            quotes = self._lines.quotes_dropped if line is None else line.count(b'"')
            quoted ^= bool(quotes % 2)
            if not quoted:
                return
            try:
                line = next(self._given)
            except StopIteration:
                return


def read_csv(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Batch]:
    """CSV or TSV with a header line, as RFC 4180 has it: a quoted field may hold newlines, and quotes are doubled."""
    yield from batched(part, _csv_rows(part, options, rejections), options, rejections)


def _csv_rows(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Document]:
    limit = options.max_document_bytes
    lines = Lines(part, options, rejections)
    given = _RowLines(lines, limit)
    csv.field_size_limit(limit)  # of the process, and there is no other way
    rows = csv.reader(given, delimiter="\t" if ".tsv" in part.path[-8:] else ",", strict=True)
    header: list[str] = []
    while True:
        start = lines.number + 1
        given.begin_row()
        try:
            row = next(rows, None)
            if row is None:
                break
        except csv.Error as error:
            rejections.add(start, MALFORMED, f"not CSV ({error})")
            continue
        except _RowTooLongError:
            if not given.named:
                rejections.add(start, TOO_LONG, f"longer than the {limit:,} bytes of --max_document_megabytes")
            continue
        if not row:
            continue
        if given.not_utf8:
            rejections.add(start, MALFORMED, "not UTF-8")
            continue
        if not header:
            header = row
            continue
        if options.text_field not in header:
            rejections.add(start, MALFORMED, no_column(options.text_field, header))
            continue
        if len(row) != len(header):
            rejections.add(start, MALFORMED, f"{len(row)} columns, the header has {len(header)}")
            continue
        fields: dict[str, Any] = dict(zip(header, row, strict=True))
        text = fields.pop(options.text_field)
        yield start, text, fields if options.fields else {}, lines.consumed()


def no_column(name: str, columns: list[str]) -> str:
    return f"no column {name!r} (found: {', '.join(columns)}; --text_field names another)"
