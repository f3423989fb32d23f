"""Documents on their way through a worker: read, changed or dropped by steps, handed to whatever writes them.

A stage is a source, steps and a writer. What a step did is counted, and a fair sample of what it removed is kept;
the counts of parts add up to the same totals however many workers there were.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Protocol

from data_prep.documents import (
    Batch,
    Part,
    ReadOptions,
    Rejections,
    find_inputs,
    list_parts,
    number_lines,
    read_batches,
)
from data_prep.files import InputFile
from data_prep.parts import Report, Work

SAMPLES_A_REASON = 20


class Step(Protocol):
    """Changes or drops documents of one part, batch after batch, in their order."""

    def __call__(self, batch: Batch) -> Batch: ...

    def summary(self) -> dict[str, Any]:
        """What it did, JSON-able, once the part is through; `merge` adds the parts up."""
        ...


class StepOptions(Protocol):
    """A step before it is made: frozen, small, picklable, and its repr identifies it."""

    name: ClassVar[str]

    def make(self, part_number: int) -> Step: ...


@dataclass(frozen=True)
class Source:
    """Where a stage's documents come from: input files and the steps that they have passed."""

    inputs: tuple[str, ...]
    reading: ReadOptions
    steps: tuple[StepOptions, ...] = ()

    def files(self) -> list[InputFile]:
        """The input files; raises UserError as `find_inputs` does."""
        return find_inputs(self.inputs)

    def parts(self) -> list[Part]:
        return list_parts(self.inputs, self.reading)

    def job(self) -> dict[str, Any]:
        """What identifies the documents in a job's key: every option of the way here."""
        return {
            "input": list(self.inputs),
            "reading": asdict(self.reading),
            "steps": [repr(step) for step in self.steps],
        }

    def then(self, step: StepOptions) -> "Source":
        """This source with one more step at its end."""
        return replace(self, steps=(*self.steps, step))

    def ready(self, work: Work) -> "Ready":
        """This source as its parts can be read: what needs a pass of its own before is done in `work`."""
        return Ready(self, self.parts())


@dataclass(frozen=True)
class Ready:
    """source: to be read part by part. parts: of the original input, one for each part of the source.

    first_pass: the summary of each part, where an earlier pass read the original input and this one what that kept.
    content: what an earlier pass found, for the manifest.
    """

    source: Source
    parts: list[Part]
    first_pass: list[dict[str, Any]] = field(default_factory=list)
    content: dict[str, Any] = field(default_factory=dict)

    def results(self, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Results of the parts, of which each holds its stream's summary: now about all passes, with true lines."""
        if not self.first_pass:
            return number_lines(self.parts, list(results))
        return [
            {
                **second,
                **{key: first[key] for key in ("read", "rejected", "rejected_documents", "lines")},
                "lengths": {"read": first["lengths"]["read"], "left": second["lengths"]["left"]},
                "steps": {**first["steps"], **second["steps"]},
            }
            for first, second in zip(self.first_pass, results, strict=True)
        ]


class DocumentStream:
    """The documents of one part after a source's steps: iterate once, then ask for the `summary`."""

    def __init__(self, source: Source, part: Part, part_number: int, report: Report) -> None:
        self._source, self._part, self._report = source, part, report
        self._steps = [options.make(part_number) for options in source.steps]
        self._rejections = Rejections(part)
        self._read = {"documents": 0, "bytes": 0}
        self._lengths_read: Counter[int] = Counter()
        self._lengths_left: Counter[int] = Counter()

    def __iter__(self) -> Iterator[Batch]:
        for batch in read_batches(self._part, self._source.reading, self._rejections):
            original, consumed = batch, batch.consumed
            if self._steps:
                self._count_read(original.sizes())
                for step in self._steps:
                    batch = step(batch)
            if batch.texts:
                yield batch
            sizes = batch.sizes()  # only now: what has been encoded meanwhile need not be encoded to be measured
            if not self._steps:
                self._count_read(sizes)
            self._lengths_left.update(size.bit_length() for size in sizes)
            self._report(len(original.texts), consumed)

    def _count_read(self, sizes: list[int]) -> None:
        self._read["documents"] += len(sizes)
        self._read["bytes"] += sum(sizes)
        self._lengths_read.update(size.bit_length() for size in sizes)

    def summary(self) -> dict[str, Any]:
        """Counts of the whole part: what was read, rejected, and what each step did with it.

        lengths: documents by the bit length of their size in bytes, as read and as left by the steps.
        """
        return {
            "read": self._read,
            "rejected": self._rejections.records,
            "rejected_documents": self._rejections.categories,
            "lines": self._rejections.lines,
            "lengths": {
                "read": {str(bits): count for bits, count in sorted(self._lengths_read.items())},
                "left": {str(bits): count for bits, count in sorted(self._lengths_left.items())},
            },
            "steps": {
                options.name: step.summary() for options, step in zip(self._source.steps, self._steps, strict=True)
            },
        }


def most_first(counts: dict[str, int]) -> list[tuple[str, int]]:
    """(name, count), the largest first, equal ones by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def describe_steps(content: dict[str, Any]) -> list[str]:
    """A line for each step of a manifest's content: what it removed, most first."""
    lines = []
    for name, step in content.get("steps", {}).items():
        removed = most_first(step.get("removed", {}))
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in removed if count)
        total = sum(count for _, count in removed)
        lines.append(f"  {name}: {total:,} documents removed{f' ({reasons})' if reasons else ''}")
    return lines


class Samples:
    """A fair sample of the documents that met each of some reasons: those with the lowest keys.

    The key is a hash of the document's place, so that the sample of all parts is the same however they were run.
    """

    def __init__(self, kept: int = SAMPLES_A_REASON) -> None:
        self._kept = kept
        self._heaps: dict[str, list[tuple[int, str, dict[str, Any]]]] = {}

    def offer(self, reason: str, place: str, make: Callable[[], dict[str, Any]]) -> None:
        """Considers the document at `place` (file:line); `make` gives what to show of it, if it is kept."""
        heap = self._heaps.setdefault(reason, [])
        key = -_hash(f"{reason} {place}")
        if len(heap) < self._kept:
            heapq.heappush(heap, (key, place, make()))
        elif key > heap[0][0]:
            heapq.heapreplace(heap, (key, place, make()))

    def summary(self) -> dict[str, list[dict[str, Any]]]:
        return {
            reason: [{"key": -key, "place": place, **shown} for key, place, shown in sorted(heap, reverse=True)]
            for reason, heap in sorted(self._heaps.items())
        }


def _hash(text: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")


def merge(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Adds up summaries of parts: numbers are added, objects merged, lists joined; of samples the lowest keys stay."""
    merged: dict[str, Any] = {}
    for summary in summaries:
        for key, value in summary.items():
            if key not in merged:
                merged[key] = merge([value]) if isinstance(value, dict) else value
            elif isinstance(value, dict):
                merged[key] = merge([merged[key], value])
            elif isinstance(value, list):
                joined = merged[key] + value
                if joined and isinstance(joined[0], dict) and "key" in joined[0]:
                    joined = sorted(joined, key=lambda sample: (sample["key"], sample["place"]))[:SAMPLES_A_REASON]
                merged[key] = joined
            elif isinstance(value, int | float):
                merged[key] = merged[key] + value
            else:
                merged[key] = value
    return merged
