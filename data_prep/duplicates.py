"""Finds duplicates among any number of documents, out of core, and drops all but the first of each cluster.

Three phases, each a map over independent parts; what one leaves in scratch files the next one reads.
1. signatures, a task a part of the source: of every document a hash of its normalized text and MinHash bands, as runs
   sorted by key. Equal keys within a run become pairs at once, so that a key stands once in a run however often its
   text is repeated.
2. matches, a task a range of keys: equal keys of different runs become pairs.
3. clusters, one task: connected components by union-find; of each the first document in input order stays.

Memory: a run holds `RUN_BYTES`, a range of keys `PARTITION_BYTES` and 64 bytes a run. The clusters are two files of
8 and 4 bytes a document, mapped, not held. Scratch files take about 16 + 12 * bands + permutations / 8 + 8 bytes a
document, and 16 bytes a pair.
"""

import contextlib
import ctypes
import functools
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from data_prep import durable
from data_prep.documents import Batch, Part, number_lines, utf8_length
from data_prep.files import InputFile, is_dataset, is_remote
from data_prep.minhash import (
    MinHashOptions,
    Texts,
    composed,
    estimated_similarity,
    exact_hashes,
    kernel,
    pointer,
    signatures,
)
from data_prep.parts import Report, Work
from data_prep.stream import DocumentStream, Ready, Samples, Source, StepOptions

EXACT, NEAR = "exact", "near"
METHODS = (EXACT, NEAR)
RUN_BYTES = 128_000_000
PARTITION_BYTES = 256_000_000
SHOWN_CHARACTERS = 300
_RECORD_WORKING_BYTES = 64  # a key (or two) and a document's number, read, ordered and grouped
_RECORD_BYTES, _PAIR_BYTES = 12, 16  # for the progress bar
_CHUNK = 1 << 20  # documents or pairs taken at a time
_ALIGNMENT = 8

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class DuplicateOptions:
    """methods: which of `METHODS` make two documents duplicates; minhash: what near duplicates are."""

    methods: tuple[str, ...] = METHODS
    minhash: MinHashOptions = field(default_factory=MinHashOptions)

    @property
    def run_documents(self) -> int:
        """Documents of a run: their bands, the order of these, and both sorted."""
        bands = self.minhash.bands if NEAR in self.methods else 0
        return max(1, RUN_BYTES // (32 * bands + 128))

    def describe(self) -> str:
        """One line for the person at the terminal."""
        if NEAR not in self.methods:
            return "exact duplicates"
        minhash = self.minhash
        return (
            f"near duplicates: {minhash.ngram}-grams, {minhash.bands} bands x {minhash.rows} rows,"
            f" threshold (1/{minhash.bands})^(1/{minhash.rows}) = {minhash.threshold:.3f}"
        )


@dataclass(frozen=True)
class DistinctSource(Source):
    """A source of whose documents the first of each cluster of duplicates stays; `ready` finds out which.

    later: steps that documents pass once the others are gone.
    """

    duplicates: DuplicateOptions = field(default_factory=DuplicateOptions)
    later: tuple[StepOptions, ...] = ()

    def job(self) -> dict[str, Any]:
        return {**super().job(), "duplicates": repr(self.duplicates), "later": [repr(step) for step in self.later]}

    def then(self, step: StepOptions) -> "DistinctSource":
        return replace(self, later=(*self.later, step))

    def ready(self, work: Work) -> Ready:
        """The documents that stay: those of scratch files where the way to them is long, of the input otherwise."""
        spill = bool(self.steps) or any(is_remote(name) or is_dataset(name) for name in self.inputs)
        found = find_duplicates(work, Source(self.inputs, self.reading, self.steps), self.duplicates, spill=spill)
        source = replace(found.source, steps=(*found.source.steps, *self.later))
        return Ready(source, self.parts(), found.results if spill else [], {"duplicates": found.content})


@dataclass(frozen=True)
class Deduplicated:
    """source: the documents without duplicates. results: one a part of the first pass over the source, each with the
    stream's summary. content: counts for a manifest."""

    source: Source
    results: list[dict[str, Any]]
    content: dict[str, Any]


def find_duplicates(work: Work, source: Source, options: DuplicateOptions, *, spill: bool = False) -> Deduplicated:
    """Finds the duplicates among a source's documents; returns the source without them.

    spill: keep the documents, as the source's steps left them, in scratch files that the returned source reads, so
        that text is read and cleaned once. Otherwise it reads the inputs again, with the same steps and one more.
    """
    scratch = work.scratch
    parts = source.parts()
    results = work.run(
        write_signatures,
        [(source, part, number, options, str(scratch), spill) for number, part in enumerate(parts)],
        part_inputs=[[part.path] for part in parts],
        part_bytes=[part.bytes for part in parts],
        description="signatures",
    )
    ranges = [
        (method, index, count)
        for method in options.methods
        for count in [partition_count(sum(result["records"][method] for result in results))]
        for index in range(count)
    ]
    sizes = {method: sum(result["records"][method] for result in results) * _RECORD_BYTES for method in options.methods}
    matches = work.run(
        match_range,
        [(str(scratch), len(parts), method, index, count) for method, index, count in ranges],
        part_inputs=[[] for _ in ranges],
        part_bytes=[sizes[method] // count for method, _, count in ranges],
        description="matches",
    )
    [clusters] = work.run(
        cluster,
        [(str(scratch), len(parts), tuple(ranges))],
        part_inputs=[[]],
        part_bytes=[sum(result["pairs"] for result in matches) * _PAIR_BYTES],
        description="clusters",
    )
    drop = DropOptions(str(scratch), options.minhash.permutations if NEAR in options.methods else 0)
    if spill:
        reading = replace(source.reading, max_document_bytes=1 << 62)
        left: Source = SpilledSource((), reading, (drop,), folder=str(scratch), count=len(parts))
    else:
        left = replace(source, steps=(*source.steps, drop))
    return Deduplicated(left, number_lines(parts, results), _content(options, clusters))


def _content(options: DuplicateOptions, clusters: dict[str, Any]) -> dict[str, Any]:
    near = {**vars(options.minhash), "threshold": options.minhash.threshold} if NEAR in options.methods else None
    return {"methods": list(options.methods), "minhash": near, **clusters}


def partition_count(records: int) -> int:
    """Ranges of keys, so that the records of one take no more than `PARTITION_BYTES`."""
    return max(1, -(-records * _RECORD_WORKING_BYTES // PARTITION_BYTES))


@dataclass(frozen=True)
class SpilledSource(Source):
    """Documents that `write_signatures` kept, a file a part."""

    folder: str = ""
    count: int = 0

    def _paths(self) -> list[str]:
        return [_spilled_name(self.folder, number) for number in range(self.count)]

    def files(self) -> list[InputFile]:
        return [InputFile.of(path) for path in self._paths()]

    def parts(self) -> list[Part]:
        return [Part(file.name, 0, file.bytes, file.bytes) for file in self.files()]


def _spilled_name(folder: str, number: int) -> str:
    return f"{folder}/spilled-{number:06d}.jsonl"


def _signatures_name(folder: str, number: int) -> Path:
    return Path(folder) / f"signatures-{number:06d}.bin"


def _pairs_name(folder: str, method: str, index: int) -> Path:
    return Path(folder) / f"pairs-{method}-{index:06d}.bin"


def _drops_name(folder: str, number: int) -> Path:
    return Path(folder) / f"drops-{number:06d}.bin"


def _places_name(folder: str) -> Path:
    return Path(folder) / "places.bin"


class _BlockWriter:
    """Arrays one after the other in a file, and at its end where each of them is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, 0
        self._sets: list[dict[str, Any]] = []

    def add(self, arrays: dict[str, Array]) -> None:
        """One set of named arrays."""
        blocks = {}
        for name, array in arrays.items():
            self._write(b"\0" * (-self._size % _ALIGNMENT))
            blocks[name] = [self._size, array.dtype.str, list(array.shape)]
            self._write(np.ascontiguousarray(array).tobytes())
        self._sets.append(blocks)

    def close(self, **header: Any) -> None:
        footer = json.dumps({"sets": self._sets, **header}).encode()
        self._write(footer)
        self._write(len(footer).to_bytes(8, "little"))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._size += len(data)


class _BlockReader:
    """What a `_BlockWriter` wrote, its arrays mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with open(path, "rb") as file:
            file.seek(-8, 2)
            length = int.from_bytes(file.read(8), "little")
            file.seek(-8 - length, 2)
            self.header: dict[str, Any] = json.loads(file.read(length))

    def arrays(self, name: str) -> Iterator[Array]:
        """The arrays of that name, one a set."""
        for blocks in self.header["sets"]:
            offset, dtype, shape = blocks[name]
            if 0 in shape:
                yield np.empty(shape, dtype)
            else:
                yield np.memmap(self._path, dtype, "r", offset, tuple(shape))


def write_signatures(
    source: Source, part: Part, number: int, options: DuplicateOptions, folder: str, spill: bool, report: Report
) -> dict[str, Any]:
    """Writes the signatures of one part's documents and, with `spill`, the documents themselves."""
    stream = DocumentStream(source, part, number, report)
    records: Counter[str] = Counter()
    run = _Run(options, 0)
    with contextlib.ExitStack() as stack:
        writer = _BlockWriter(stack.enter_context(durable.replacing(_signatures_name(folder, number))))
        spilled = stack.enter_context(durable.replacing(Path(_spilled_name(folder, number)))) if spill else None

        def end_run() -> _Run:
            arrays = run.arrays()
            writer.add(arrays)
            records.update({method: len(arrays[f"{method}_keys"]) for method in options.methods})
            return _Run(options, run.end)

        for batch in stream:
            run.add(batch)
            if spilled:
                spilled.writelines(batch.json_lines(source.reading.text_field))
            if run.end - run.start >= options.run_documents:
                run = end_run()
        documents = end_run().end
        summary = stream.summary()
        writer.close(path=part.path, lines=summary["lines"], documents=documents)
    return {**summary, "documents": documents, "records": dict(records)}


class _Run:
    """The signatures of consecutive documents of a part, from number `start` to `end`."""

    def __init__(self, options: DuplicateOptions, start: int) -> None:
        self._options, self.start, self.end = options, start, start
        minhash = options.minhash
        self._exact = [np.empty((0, 2), np.uint64)]
        self._bands = [np.empty((0, minhash.bands), np.uint64)]
        self._sketches = [np.empty((0, (minhash.permutations + 7) // 8), np.uint8)]
        self._ngrams = [np.empty(0, np.int64)]
        self._lines = [np.empty(0, np.int64)]

    def add(self, batch: Batch) -> None:
        texts = Texts(composed(batch.texts))
        self.end += len(texts)
        self._lines.append(np.array(batch.lines, np.int64))
        if EXACT in self._options.methods:
            self._exact.append(exact_hashes(texts))
        if NEAR in self._options.methods:
            made = signatures(texts, self._options.minhash)
            self._bands.append(made.band_hashes)
            self._sketches.append(made.sketches)
            self._ngrams.append(made.ngrams)

    def arrays(self) -> dict[str, Array]:
        """For each method its keys, sorted, each once; of each the first document; pairs of documents of equal keys.

        Documents are numbered within the part. An exact duplicate needs no bands: it is joined to its first.
        """
        arrays: dict[str, Array] = {"lines": np.concatenate(self._lines)}
        numbers = np.arange(self.start, self.end, dtype=np.uint64)
        first = np.ones(len(numbers), bool)
        if EXACT in self._options.methods:
            keys = np.concatenate(self._exact)
            groups = _grouped(numbers, keys[:, 0], keys[:, 1])
            first[groups.pairs[:, 1] - self.start] = False
            arrays |= groups.arrays(EXACT)
        if NEAR in self._options.methods:
            chosen = np.flatnonzero(first & (np.concatenate(self._ngrams) > 0))
            bands = np.concatenate(self._bands)[chosen]
            arrays |= _grouped(np.repeat(numbers[chosen], bands.shape[1]), bands.reshape(-1)).arrays(NEAR)
            arrays["sketches"] = np.concatenate(self._sketches)
        return arrays


@dataclass(frozen=True)
class _Groups:
    """Records by key: keys (and lower halves of keys) [keys], ascending and distinct; the lowest document of each
    [keys]; pairs [pairs, 2] of that and another document of the key, each once."""

    keys: Array
    lower: Array | None
    documents: Array
    pairs: Array

    def arrays(self, method: str) -> dict[str, Array]:
        lower = {} if self.lower is None else {f"{method}_lower": self.lower}
        return {
            f"{method}_keys": self.keys,
            **lower,
            f"{method}_documents": self.documents.astype(np.uint32),
            f"{method}_pairs": self.pairs.astype(np.uint32),
        }


def _grouped(documents: Array, keys: Array, lower: Array | None = None) -> _Groups:
    """Groups documents [records] by their keys [records] of 64 bits, or 128 with `lower`."""
    if not len(keys):
        return _Groups(keys, lower, documents, np.empty((0, 2), np.uint64))
    order = np.argsort(keys) if lower is None else np.lexsort((lower, keys))
    keys, documents = keys[order], documents[order]
    begins = np.ones(len(keys), bool)
    begins[1:] = keys[1:] != keys[:-1]
    if lower is not None:
        lower = lower[order]
        begins[1:] |= lower[1:] != lower[:-1]
    starts = np.flatnonzero(begins)
    lowest = np.minimum.reduceat(documents, starts)
    if len(starts) == len(keys):
        return _Groups(keys, lower, documents, np.empty((0, 2), np.uint64))
    lowest_of_each = np.repeat(lowest, np.diff(starts, append=len(keys)))
    others = np.flatnonzero(documents != lowest_of_each)
    pairs = np.stack((lowest_of_each[others], documents[others]), axis=1)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    if len(pairs):
        pairs = pairs[np.append(True, (pairs[1:] != pairs[:-1]).any(axis=1))]
    return _Groups(keys[starts], None if lower is None else lower[starts], lowest, pairs)


def match_range(folder: str, parts: int, method: str, index: int, count: int, report: Report) -> dict[str, Any]:
    """Pairs the documents of different runs that share a key of range `index` of `count`; numbers are the corpus's."""
    low, high = (-(-(edge << 64) // count) for edge in (index, index + 1))
    keys, lowers, documents = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    base = 0
    for number in range(parts):
        reader = _BlockReader(_signatures_name(folder, number))
        lower_halves = reader.arrays(f"{method}_lower") if method == EXACT else itertools.repeat(None)
        for of_run, lower, numbers in zip(
            reader.arrays(f"{method}_keys"), lower_halves, reader.arrays(f"{method}_documents"), strict=False
        ):
            begin = int(np.searchsorted(of_run, np.uint64(low)))
            end = int(np.searchsorted(of_run, np.uint64(high))) if high < 1 << 64 else len(of_run)
            keys.append(np.array(of_run[begin:end]))
            documents.append(numbers[begin:end].astype(np.uint64) + np.uint64(base))
            if lower is not None:
                lowers.append(np.array(lower[begin:end]))
        base += reader.header["documents"]
    all_keys = np.concatenate(keys)
    groups = _grouped(np.concatenate(documents), all_keys, np.concatenate(lowers) if method == EXACT else None)
    with durable.replacing(_pairs_name(folder, method, index)) as file:
        writer = _BlockWriter(file)
        writer.add({"pairs": groups.pairs})
        writer.close()
    report(0, len(all_keys) * _RECORD_BYTES)
    return {"pairs": len(groups.pairs)}


def cluster(folder: str, parts: int, ranges: tuple[tuple[str, int, int], ...], report: Report) -> dict[str, Any]:
    """Joins all pairs to clusters and writes, a file a part, which documents are not the first of theirs.

    Counts: documents; removed as exact duplicates, and those that only nearness joins; clusters by size.
    """
    readers = [_BlockReader(_signatures_name(folder, number)) for number in range(parts)]
    bases = np.cumsum([0, *(reader.header["documents"] for reader in readers)])
    total = int(bases[-1])
    methods = {method for method, _, _ in ranges}
    removed: Counter[str] = Counter()
    with _mapped(folder, total, np.uint64) as parents, _mapped(folder, total, np.uint32) as sizes:
        for method in METHODS:  # exact ones first: what is left to the near ones is theirs alone
            if method in methods:
                for pairs in _all_pairs(folder, method, readers, bases, ranges):
                    failed = kernel().unite(
                        pointer(parents), ctypes.c_int64(total), pointer(pairs), ctypes.c_int64(len(pairs)),
                        ctypes.c_int(method == EXACT),
                    )  # fmt: skip
                    assert not failed, f"{folder}: a pair of documents beyond the {total} there are"
        for number in range(parts):
            removed.update(_write_drops(folder, number, bases, parents, sizes))
        histogram, largest = _histogram(sizes)
    _write_places(folder, readers)
    report(0, 0)
    return {
        "documents": total,
        "removed": {method: removed[method] for method in METHODS if method in methods},
        "clusters": sum(histogram.values()),
        "largest_cluster": largest,
        "cluster_sizes": histogram,
    }


@contextlib.contextmanager
def _mapped(folder: str, count: int, dtype: type) -> Iterator[Array]:
    """Zeros [count] in a nameless file, which is sparse where nothing is written and which the system may page out."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(max(1, count) * np.dtype(dtype).itemsize)
        yield np.memmap(file, dtype, "r+", shape=(max(1, count),))


def _all_pairs(
    folder: str, method: str, readers: list["_BlockReader"], bases: Array, ranges: tuple[tuple[str, int, int], ...]
) -> Iterator[Array]:
    """All pairs of a method, some at a time [pairs, 2], in the corpus's numbers."""
    for reader, base in zip(readers, bases[:-1], strict=True):
        for pairs in reader.arrays(f"{method}_pairs"):
            for start in range(0, len(pairs), _CHUNK):
                yield pairs[start : start + _CHUNK].astype(np.uint64) + np.uint64(base)
    for of_method, index, _ in ranges:
        if of_method == method:
            for pairs in _BlockReader(_pairs_name(folder, method, index)).arrays("pairs"):
                for start in range(0, len(pairs), _CHUNK):
                    yield np.array(pairs[start : start + _CHUNK])


def _write_drops(folder: str, number: int, bases: Array, parents: Array, sizes: Array) -> Counter[str]:
    """Writes the part's documents to be dropped, ascending, and for each the part and number of the one kept."""
    removed: Counter[str] = Counter()
    with durable.replacing(_drops_name(folder, number)) as file:
        writer = _BlockWriter(file)
        first, end = int(bases[number]), int(bases[number + 1])
        for start in range(first, end, _CHUNK):
            count = min(_CHUNK, end - start)
            numbers, roots, exact = np.empty(count, np.uint64), np.empty(count, np.uint64), np.empty(count, np.uint8)
            found = kernel().list_duplicates(
                pointer(parents), ctypes.c_int64(start), ctypes.c_int64(count), pointer(numbers), pointer(roots),
                pointer(exact), pointer(sizes),
            )  # fmt: skip
            roots = roots[:found].astype(np.int64)
            kept_parts = np.searchsorted(bases, roots, side="right") - 1
            writer.add(
                {
                    "documents": (numbers[:found].astype(np.int64) - first).astype(np.uint32),
                    "kept_parts": kept_parts.astype(np.uint32),
                    "kept_documents": (roots - bases[kept_parts]).astype(np.uint32),
                    "exact": exact[:found],
                }
            )
            removed[EXACT] += int(exact[:found].sum())
            removed[NEAR] += found - int(exact[:found].sum())
        writer.close()
    return removed


def _write_places(folder: str, readers: list["_BlockReader"]) -> None:
    """Writes how many lines of its file come before each part, so that a sample can name any document's line."""
    lines_before, before, path = [], 0, None
    for reader in readers:
        if reader.header["path"] != path:
            before, path = 0, reader.header["path"]
        lines_before.append(before)
        before += reader.header["lines"]
    with durable.replacing(_places_name(folder)) as file:
        writer = _BlockWriter(file)
        writer.add({"lines_before": np.array(lines_before, np.int64)})
        writer.close()


def _histogram(sizes: Array) -> tuple[dict[str, int], int]:
    """Clusters of 2, 3-4, 5-8, ... documents, and the size of the largest; sizes: documents but the first [roots]."""
    counts: Counter[int] = Counter()
    largest = 0
    for start in range(0, len(sizes), _CHUNK):
        others = sizes[start : start + _CHUNK]
        others = others[others > 0].astype(np.int64)
        if len(others):
            largest = max(largest, int(others.max()) + 1)
            bits, found = np.unique(np.frexp(others)[1], return_counts=True)  # size n + 1 in (2^(b-1), 2^b]
            counts.update(dict(zip(bits.tolist(), found.tolist(), strict=True)))
    return {
        str(2) if bits == 1 else f"{2 ** (bits - 1) + 1}-{2**bits}": count for bits, count in sorted(counts.items())
    }, largest


@dataclass(frozen=True)
class DropOptions:
    """Drops the documents that `cluster` found in each part; the documents are numbered as they reach the step.

    permutations: of the sketches in the signatures; 0 where there are none.
    """

    folder: str
    permutations: int
    name: ClassVar[str] = "deduplicate"

    def make(self, part_number: int) -> "DropStep":
        return DropStep(self, part_number)


@dataclass(frozen=True)
class Drops:
    """Documents of a part to be dropped: their numbers, ascending, and lines; of each the part and number of the
    document kept, and whether an equal one comes before it [drops]."""

    documents: Array
    lines: Array
    kept_parts: Array
    kept_documents: Array
    exact: Array


class DropStep:
    """Drops documents by their numbers within the part; memory is that of `_CHUNK` documents' drops."""

    def __init__(self, options: DropOptions, part_number: int) -> None:
        self._options, self._part_number = options, part_number
        self.drops = functools.lru_cache(maxsize=1)(self._read_drops)
        self._signatures = functools.lru_cache(maxsize=8)(self._read_signatures)
        self._blocks = _BlockReader(_drops_name(options.folder, part_number))
        [self._lines_before] = _BlockReader(_places_name(options.folder)).arrays("lines_before")
        self._path = self._signatures(part_number).header["path"]
        self._seen = 0
        self._removed: Counter[str] = Counter()
        self._removed_bytes = 0
        self._samples = Samples()

    def __call__(self, batch: Batch) -> Batch:
        start, self._seen = self._seen, self._seen + len(batch.texts)
        dropped = set()
        for chunk in range(start // _CHUNK, -(-self._seen // _CHUNK)):
            drops = self.drops(chunk)
            for drop in range(*np.searchsorted(drops.documents, (start, self._seen)).tolist()):
                index = int(drops.documents[drop]) - start
                self._drop(batch.texts[index], drops, drop)
                dropped.add(index)
        if not dropped:
            return batch
        return batch.select([index for index in range(len(batch.texts)) if index not in dropped])

    def _read_drops(self, chunk: int) -> Drops:
        """The drops among documents [chunk * _CHUNK, (chunk + 1) * _CHUNK) of the part; none beyond its end."""
        names = ("documents", "kept_parts", "kept_documents", "exact")
        found = {
            name: np.concatenate(
                [np.empty(0, np.uint8), *itertools.islice(self._blocks.arrays(name), chunk, chunk + 1)]
            )
            for name in names
        }
        documents = found["documents"].astype(np.int64)
        lines = _gathered(self._signatures(self._part_number).arrays("lines"), documents)
        return Drops(documents, lines, found["kept_parts"], found["kept_documents"], found["exact"])

    def _drop(self, text: str, drops: Drops, drop: int) -> None:
        reason = EXACT if drops.exact[drop] else NEAR
        self._removed[reason] += 1
        self._removed_bytes += utf8_length(text)
        place = f"{self._path}:{drops.lines[drop] + self._lines_before[self._part_number]}"
        self._samples.offer(reason, place, lambda: self._shown(text, drops, drop))

    def _shown(self, text: str, drops: Drops, drop: int) -> dict[str, Any]:
        kept_part, kept = int(drops.kept_parts[drop]), drops.kept_documents[drop : drop + 1].astype(np.int64)
        of_kept = self._signatures(kept_part)
        [line] = _gathered(of_kept.arrays("lines"), kept) + self._lines_before[kept_part]
        shown = {"text": text[:SHOWN_CHARACTERS], "kept": f"{of_kept.header['path']}:{line}"}
        if not self._options.permutations:
            return shown
        here = self._signatures(self._part_number).arrays("sketches")
        a, b = _gathered(here, drops.documents[drop : drop + 1]), _gathered(of_kept.arrays("sketches"), kept)
        return {**shown, "similarity": round(estimated_similarity(a, b, self._options.permutations), 3)}

    def _read_signatures(self, part_number: int) -> "_BlockReader":
        return _BlockReader(_signatures_name(self._options.folder, part_number))

    def summary(self) -> dict[str, Any]:
        return {
            "documents": self._seen,
            "removed": dict(sorted(self._removed.items())),
            "removed_bytes": self._removed_bytes,
            "samples": self._samples.summary(),
        }


def _gathered(arrays: Iterator[Array], indices: Array) -> Array:
    """Items at ascending `indices` of arrays laid end to end."""
    found, base = [], 0
    for array in arrays:
        start, end = np.searchsorted(indices, (base, base + len(array)))
        found.append(array[indices[start:end] - base])
        base += len(array)
    return np.concatenate(found)
