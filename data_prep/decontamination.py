"""Removes documents that share an n-gram of words with evaluation data (GPT-3: Brown et al. 2020, appendix C).

Words are those of near deduplication (docs/deduplication.md). An n-gram counts when at least half of its words are
more than numbers, so that a table of figures contaminates nothing.
"""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from data_prep import files
from data_prep.documents import Batch, ReadOptions, list_parts, read_texts, utf8_length
from data_prep.errors import UserError
from data_prep.files import InputFile
from data_prep.minhash import Texts, composed, kernel, pointer
from data_prep.stream import Samples

CONTAMINATED = "contaminated"
DEFAULT_NGRAM = 13
SHOWN_CHARACTERS = 300
_BATCH_BYTES = 1 << 20
_JSON = (".json", ".jsonl", ".ndjson")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class DecontaminateOptions:
    """Drops documents with at least `matches` n-grams of `ngram` words that stand in evaluation data; made by `of`.

    inputs: the evaluation files with their sizes and times of change, so that the repr says when they changed.
    field: key or column of their texts; "": every string of JSON, every cell of other lines.
    """

    inputs: tuple[InputFile, ...]
    field: str = ""
    ngram: int = DEFAULT_NGRAM
    matches: int = 1
    name: ClassVar[str] = "decontaminate"

    @staticmethod
    def of(
        patterns: Sequence[str], *, field: str = "", ngram: int = DEFAULT_NGRAM, matches: int = 1
    ) -> "DecontaminateOptions":
        """Raises UserError for a pattern that matches no file, or files of which no text has `ngram` words."""
        names: dict[str, None] = {}
        for pattern in patterns:
            found = files.expand(pattern)
            if not found:
                raise UserError(f"--decontaminate {pattern} matches no file")
            names |= dict.fromkeys(found)
        options = DecontaminateOptions(tuple(map(InputFile.of, sorted(names))), field, ngram, matches)
        index = _index(options)
        if not index.hashes:
            raise UserError(
                f"--decontaminate {' '.join(patterns)}: none of the {index.texts} texts has {ngram} words;"
                " give the field that holds the text with --decontaminate_field, or a smaller --decontaminate_ngram"
            )
        return options

    def make(self, part_number: int) -> "DecontaminateStep":
        return DecontaminateStep(self)

    def describe(self) -> dict[str, int]:
        """Texts of the evaluation data, those too short to be found, and distinct n-grams looked for."""
        index = _index(self)
        return {"texts": index.texts, "short_texts": index.short, "ngrams": index.hashes}


@dataclass(frozen=True)
class _Index:
    """The n-grams of evaluation data: an open-addressed table [2^bits] of their hashes."""

    table: Array
    bits: int
    hashes: int
    texts: int
    short: int


@functools.lru_cache(maxsize=2)
def _index(options: DecontaminateOptions) -> _Index:
    """Read once a process: its parts share it. Memory: 16 to 40 bytes an n-gram."""
    found: list[Array] = [np.empty(0, np.uint64)]
    texts = short = 0
    for batch in _in_batches(_evaluation_texts(options)):
        data = Texts(composed(batch))
        hashes = np.empty(len(data.buffer) // 2 + len(data), np.uint64)  # a word takes two bytes with its separator
        words = np.empty(len(data), np.int64)
        count = kernel().ngram_hashes(
            *data.arguments,
            ctypes.c_int64(options.ngram),
            pointer(hashes),
            ctypes.c_int64(len(hashes)),
            pointer(words),
        )
        if count < 0:
            raise MemoryError("n-grams")
        found.append(np.unique(hashes[:count]))
        texts += len(batch)
        short += int((words < options.ngram).sum())
    hashes = np.unique(np.concatenate(found))
    bits = max(1, (2 * len(hashes)).bit_length())
    table = np.zeros(1 << bits, np.uint64)
    kernel().fill_table(pointer(hashes), ctypes.c_int64(len(hashes)), pointer(table), ctypes.c_int(bits))
    return _Index(table, bits, len(hashes), texts, short)


def _in_batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _evaluation_texts(options: DecontaminateOptions) -> Iterator[str]:
    """Every text of the evaluation files that holds more than white space."""
    for file in options.inputs:
        if options.field:
            reading = ReadOptions(text_field=options.field)
            for part in list_parts([file.name], reading):
                yield from read_texts(part, reading)
        elif file.name.removesuffix(".gz").removesuffix(".zst").endswith(_JSON):
            yield from filter(str.strip, _strings_of_json(file.name))
        elif file.name.endswith((".parquet", ".arrow", ".feather")):
            raise UserError(f"--decontaminate {file.name}: give its column of texts with --decontaminate_field")
        else:
            for line in _lines(file.name):
                yield from filter(str.strip, line.split("\t"))


def _lines(name: str) -> Iterator[str]:
    with files.Watched(name) as raw:
        for line in files.buffered(name, raw):
            yield line.decode(errors="replace").rstrip("\r\n")


def _strings_of_json(name: str) -> Iterator[str]:
    """Every string value of a file of one JSON value, or of one a line."""
    import orjson

    with files.Watched(name) as raw:
        content = files.buffered(name, raw).read()
    try:
        values: Iterator[Any] = iter([orjson.loads(content)])
    except ValueError:
        values = map(orjson.loads, filter(bytes.strip, content.splitlines()))
    try:
        for value in values:
            yield from _strings(value)
    except ValueError as error:
        raise UserError(f"--decontaminate {name}: neither JSON nor JSON lines ({error})") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


class DecontaminateStep:
    """Drops the documents that hold n-grams of evaluation data."""

    def __init__(self, options: DecontaminateOptions) -> None:
        self._options, self._index = options, _index(options)
        self._seen = self._removed = self._removed_bytes = 0
        self._samples = Samples()

    def __call__(self, batch: Batch) -> Batch:
        self._seen += len(batch.texts)
        texts = composed(batch.texts)
        data = Texts(texts)
        matches, spans = np.empty(len(data), np.int64), np.empty((len(data), 2), np.int64)
        failed = kernel().find_ngrams(
            *data.arguments,
            ctypes.c_int64(self._options.ngram),
            pointer(self._index.table),
            ctypes.c_int(self._index.bits),
            ctypes.c_int64(self._options.matches),
            pointer(matches),
            pointer(spans),
        )
        if failed:
            raise MemoryError("n-grams")
        kept = np.flatnonzero(matches < self._options.matches).tolist()
        if len(kept) == len(data):
            return batch
        for index in np.flatnonzero(matches >= self._options.matches).tolist():
            self._drop(batch, index, texts[index], spans[index].tolist())
        return batch.select(kept)

    def _drop(self, batch: Batch, index: int, text: str, span: list[int]) -> None:
        self._removed += 1
        self._removed_bytes += utf8_length(batch.texts[index])

        def shown() -> dict[str, Any]:
            ngram = text.encode()[slice(*span)].decode()
            return {"text": batch.texts[index][:SHOWN_CHARACTERS], "ngram": " ".join(ngram.split())}

        self._samples.offer(CONTAMINATED, batch.place(index), shown)

    def summary(self) -> dict[str, Any]:
        return {
            "documents": self._seen,
            "removed": {CONTAMINATED: self._removed},
            "removed_bytes": self._removed_bytes,
            "samples": self._samples.summary(),
        }
