"""Readers of tables: Parquet, Arrow, and what the datasets library serves."""

import base64
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep import files
from data_prep.documents import DAMAGED, MALFORMED, Batch, Part, ReadOptions, Rejections
from data_prep.errors import UserError, nearest
from data_prep.files import InputFile
from data_prep.readers import Document, batched, damage, no_column

_ROWS_BYTES = 1 << 21  # decoded at a time
_MOST_ROWS = 4096
_IPC_FILE_MAGIC = b"ARROW1"


def cut(file: InputFile, kind: str, options: ReadOptions) -> list[Part]:
    """The parts of a table; raises UserError for a data set that cannot be opened.

    A damaged file is one part: its reader will name it.
    """
    whole = [Part(file.name, 0, -1, file.bytes)]
    if kind == "dataset":
        return _dataset_parts(file, options)
    if file.bytes <= options.part_bytes:
        return whole
    with files.Watched(file.name) as watched:
        try:
            sizes = _row_group_bytes(watched) if kind == "parquet" else _record_batches(watched)
        except Exception:
            watched.raise_failure()
            return whole
    return _grouped(file, sizes, options.part_bytes) or whole


def _row_group_bytes(file: files.Watched) -> list[int]:
    import pyarrow.parquet

    metadata = pyarrow.parquet.ParquetFile(file).metadata
    return [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]


def _record_batches(file: files.Watched) -> list[int]:
    """One for each record batch of an Arrow file, whose sizes stand beside them; none for a stream."""
    import pyarrow.ipc

    if file.read(len(_IPC_FILE_MAGIC)) != _IPC_FILE_MAGIC:
        return []
    return [1] * int(pyarrow.ipc.open_file(file).num_record_batches)


def _grouped(file: InputFile, sizes: list[int], part_bytes: int) -> list[Part]:
    """Consecutive pieces of the file, of the relative `sizes`, in parts of about `part_bytes`."""
    ends = [file.bytes * size // max(sum(sizes), 1) for size in itertools.accumulate(sizes)]
    parts: list[Part] = []
    start = told = 0
    for index, end in enumerate(ends, 1):
        if end - told >= part_bytes or index == len(ends):
            parts.append(Part(file.name, start, index, end - told))
            start, told = index, end
    return parts


# --- rows of Arrow


@dataclass
class _Column:
    """Where the text is: a column, or for "a.b" where there is none such, field b of column a.

    name: the column; path: the fields below it.
    """

    name: str
    path: list[str]

    @staticmethod
    def of(text_field: str, columns: list[str]) -> "_Column | None":
        name, *path = text_field.split(".")
        if text_field in columns:
            return _Column(text_field, [])
        return _Column(name, path) if path and name in columns else None

    def texts(self, table: Any) -> list[Any]:
        """The texts of the rows; bytes where they are not UTF-8, None where there is no string."""
        import pyarrow
        import pyarrow.compute

        column = table.column(self.name)
        try:
            if self.path:
                column = pyarrow.compute.struct_field(column, self.path)
            if pyarrow.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
        except (pyarrow.ArrowException, KeyError):
            return [None] * table.num_rows
        try:
            values = column.to_pylist()
        except (UnicodeDecodeError, ValueError):
            values = [_value(value) for value in column]
        return [_decoded(value) if isinstance(value, bytes) else value for value in values]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (UnicodeDecodeError, ValueError):
        return b"\xff"


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _jsonable(value: Any) -> Any:
    """What orjson can write in the place of `value`: bytes in base64, decimals and durations as text."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _others(table: Any, column: _Column) -> list[dict[str, Any]]:
    """The other fields of the rows."""
    rows: list[dict[str, Any]] = []
    rest = table if column.path else table.drop_columns([column.name])
    try:
        values = rest.to_pylist()
    except (UnicodeDecodeError, ValueError):
        values = [{name: _value(rest.column(name)[row]) for name in rest.schema.names} for row in range(rest.num_rows)]
    for fields in values:
        holder: Any = fields
        for name in [column.name, *column.path[:-1]] if column.path else []:
            holder = holder.get(name) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and column.path:
            holder.pop(column.path[-1], None)
        rows.append(_jsonable(fields))
    return rows


def _check(table: Any) -> None:
    """Raises ArrowInvalid for offsets that lead out of their buffers, which would end the process when followed.

    Text that is not UTF-8 passes: its rows are named one by one.
    """
    import pyarrow

    try:
        table.validate(full=True)
    except pyarrow.ArrowInvalid:
        for column in table.columns:
            for kind, raw in (
                (pyarrow.string(), pyarrow.binary()),
                (pyarrow.large_string(), pyarrow.large_binary()),
                (pyarrow.string_view(), pyarrow.binary_view()),
            ):
                if column.type == kind:
                    column = column.cast(raw) if kind == pyarrow.string_view() else column.view(raw)
            column.validate(full=True)


class _Rows:
    """The rows of tables of one part as documents.

    rows: how many the part has as far as it is known, for progress.
    """

    def __init__(self, part: Part, options: ReadOptions, rejections: Rejections, rows: int) -> None:
        self.row = 0
        self._part, self._options, self._rejections, self._rows = part, options, rejections, rows
        self._told = 0

    def documents(self, table: Any, column: _Column) -> Iterator[Document]:
        texts = column.texts(table)
        others = _others(table, column) if self._options.fields else ({} for _ in texts)
        for text, fields in zip(texts, others, strict=True):
            self.row += 1
            if isinstance(text, str):
                now = self._part.bytes * self.row // max(self._rows, self.row)
                yield self.row, text, fields, now - self._told
                self._told = now
            else:
                wrong = "not UTF-8" if isinstance(text, bytes) else "not a string"
                self._rejections.add(self.row, MALFORMED, f"{self._options.text_field!r} is {wrong}")

    def lost(self, category: str, reason: str, rows: int) -> None:
        """Names the next `rows` rows (at least one) as lost together."""
        self._rejections.add(self.row + 1, category, reason, max(rows, 1))
        self.row += rows


# --- Parquet


def read_parquet(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Batch]:
    """A row a document; a damaged row group loses what is left of it, and no other."""
    yield from batched(part, _parquet_rows(part, options, rejections), options, rejections)


def _parquet_rows(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Document]:
    import pyarrow.parquet

    with files.Watched(part.path) as watched:
        try:
            # Buffered, a row group is read page by page; otherwise whole.
            file = pyarrow.parquet.ParquetFile(
                watched, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
            )
            metadata, columns = file.metadata, file.schema_arrow.names
        except Exception as error:
            watched.raise_failure()
            rejections.add(1, DAMAGED, f"not a readable Parquet file ({damage(error)})")
            return
        groups = range(part.start, metadata.num_row_groups if part.end < 0 else part.end)
        total = sum(metadata.row_group(index).num_rows for index in groups)
        rows = _Rows(part, options, rejections, total)
        column = _Column.of(options.text_field, columns)
        if column is None:
            rows.lost(MALFORMED, no_column(options.text_field, columns), total)
        else:
            wanted = None if options.fields else [options.text_field]
            first = 0
            for index in groups:
                group = metadata.row_group(index)
                first += group.num_rows
                size = max(1, min(_MOST_ROWS, _ROWS_BYTES * group.num_rows // max(group.total_byte_size, 1)))
                try:
                    for table in file.iter_batches(size, row_groups=[index], columns=wanted, use_threads=False):
                        yield from rows.documents(table, column)
                except Exception as error:
                    watched.raise_failure()
                    rows.lost(DAMAGED, f"row group {index}: {damage(error)}", first - rows.row)
        rejections.lines = rows.row


# --- Arrow


def read_arrow(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Batch]:
    """A row a document, of Arrow's file format (Feather) or stream format (what the datasets library writes)."""
    yield from batched(part, _arrow_rows(part, options, rejections), options, rejections)


def _arrow_rows(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Document]:
    import pyarrow.ipc

    rows = _Rows(part, options, rejections, 0)
    with files.Watched(part.path) as watched:
        try:
            is_file = watched.read(len(_IPC_FILE_MAGIC)) == _IPC_FILE_MAGIC
            watched.seek(0)
            opened = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(watched)
            columns = opened.schema.names
        except Exception as error:
            watched.raise_failure()
            rejections.add(1, DAMAGED, f"not a readable Arrow file ({damage(error)})")
            return
        column = _Column.of(options.text_field, columns)
        last = part.end if part.end >= 0 else opened.num_record_batches if is_file else None
        for index in itertools.count(part.start) if last is None else range(part.start, last):
            try:
                table = opened.get_batch(index) if is_file else opened.read_next_batch()
                _check(table)
                if column is None:
                    rows.lost(MALFORMED, no_column(options.text_field, columns), table.num_rows)
                    continue
                step = max(1, min(_MOST_ROWS, _ROWS_BYTES * table.num_rows // max(table.nbytes, 1)))
                for start in range(0, table.num_rows, step):
                    yield from rows.documents(table.slice(start, step), column)
            except StopIteration:
                break
            except Exception as error:
                watched.raise_failure()
                rows.lost(DAMAGED, f"record batch {index}: {damage(error)}", 0)
                if not is_file:
                    break
        rejections.lines = rows.row


# --- the datasets library


def _open_dataset(name: str) -> Any:
    """The data set of dataset:NAME_OR_FOLDER[?split=S&config=C]: on disk as save_to_disk left it, or streaming."""
    from urllib.parse import parse_qsl

    path, _, query = name.removeprefix(files.DATASET).partition("?")
    settings = dict(parse_qsl(query))
    for key in settings:
        if key not in ("split", "config"):
            raise UserError(f"--input {name}: unknown setting {key!r}: {nearest(key, ('split', 'config'))}")
    import datasets

    datasets.disable_progress_bars()
    split = settings.get("split", "train")
    try:
        if os.path.isfile(os.path.join(path, "state.json")) or os.path.isfile(os.path.join(path, "dataset_dict.json")):
            opened = datasets.load_from_disk(path)
            return opened[split] if isinstance(opened, datasets.DatasetDict) else opened
        return datasets.load_dataset(path, settings.get("config"), split=split, streaming=True)
    except KeyError as error:
        raise UserError(f"--input {name}: no split {error}; expected one of: {', '.join(opened)}") from None
    except Exception as error:
        raise UserError(f"--input {name}: cannot be opened ({' '.join(str(error).split())})") from None


def _dataset_parts(file: InputFile, options: ReadOptions) -> list[Part]:
    opened = _open_dataset(file.name)
    if not hasattr(opened, "num_rows"):  # a part is a file of the data set, or what else it is made of
        shards = opened.num_shards
        return _grouped(file, [1] * shards, 0)
    pieces = max(1, min(opened.num_rows, -(-file.bytes // options.part_bytes)))
    bounds = [opened.num_rows * piece // pieces for piece in range(pieces + 1)]
    return [
        Part(file.name, start, end, file.bytes * (piece + 1) // pieces - file.bytes * piece // pieces)
        for piece, (start, end) in enumerate(itertools.pairwise(bounds))
        if end > start
    ]


def read_dataset(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Batch]:
    """Rows [start, end) of a data set on disk, or shard `start` of one that streams.

    What fails in the library is the data's fault where it says so; everything else is the storage's.
    """
    yield from batched(part, _dataset_rows(part, options, rejections), options, rejections)


def _dataset_rows(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Document]:
    import datasets
    import pyarrow

    opened = _open_dataset(part.path)
    on_disk = hasattr(opened, "num_rows")
    rows = _Rows(part, options, rejections, part.end - part.start if on_disk else 0)
    opened = opened.select(range(part.start, part.end)) if on_disk else opened.shard(opened.num_shards, part.start)
    columns = opened.column_names
    if columns and not options.fields and (column := _Column.of(options.text_field, columns)):
        opened = opened.select_columns([column.name])
    try:
        for table in opened.with_format("arrow").iter(batch_size=256):
            _check(table)
            column = _Column.of(options.text_field, table.schema.names)
            if column is None:
                rows.lost(MALFORMED, no_column(options.text_field, table.schema.names), table.num_rows)
            else:
                yield from rows.documents(table, column)
    except (pyarrow.ArrowInvalid, datasets.exceptions.DatasetGenerationError, UnicodeDecodeError) as error:
        rows.lost(DAMAGED, damage(error), part.end - part.start - rows.row if on_disk else 0)
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{part.path}: cannot be read: {' '.join(str(error).split())}") from error
    rejections.lines = rows.row
