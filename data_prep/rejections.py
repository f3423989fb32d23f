"""How much bad input a job bears: rejected documents are counted part by part, and too many of them stop it."""

import json
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.documents import EMPTY, REJECTED_NAME
from data_prep.errors import UserError

_EARLY = 20  # fewer rejected documents say little about the rest of the input
_SHOWN = 3


def bad_documents(result: dict[str, Any]) -> int:
    """Rejected documents of one part, from its result (`DocumentStream.summary`); those without text are none."""
    if isinstance(categories := result.get("rejected_documents"), dict):
        return sum(count for category, count in categories.items() if category != EMPTY)
    return len(_bad_records(result))


def _bad_records(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [record for record in result.get("rejected", []) if record.get("category") != EMPTY]


class Tolerance:
    """Adds up the finished parts of one phase and stops it with UserError.

    A job stops when more than `fraction` of all its documents, the rejected ones included, were rejected: at the end
    exactly, and before it as soon as at least 20 are rejected and they are more than that of all the documents that
    the input will hold, judging by those of the bytes that are done.
    """

    def __init__(self, fraction: float, description: str, total_bytes: int, output_dir: Path) -> None:
        self._fraction, self._description = fraction, description
        self._total_bytes, self._output_dir = total_bytes, output_dir
        self._bad = self._documents = self._bytes = 0
        self._results: list[tuple[int, dict[str, Any]]] = []

    def add(self, part: int, result: dict[str, Any], size: int) -> None:
        """Counts a finished part of `size` bytes of input; raises UserError when it is one too many."""
        bad = bad_documents(result)
        self._bad += bad
        self._documents += bad + result.get("read", {}).get("documents", 0)
        self._bytes += size
        if bad:
            self._results.append((part, result))
        if self._bad >= _EARLY and self._bytes:
            projected = self._documents * max(self._total_bytes / self._bytes, 1)
            if self._bad > self._fraction * projected:
                self._stop()

    def finish(self) -> None:
        """Raises UserError when too many documents of the whole input were rejected."""
        if self._bad > self._fraction * self._documents:
            self._stop()

    def _stop(self) -> None:
        records = [
            record for _, result in sorted(self._results, key=lambda kept: kept[0]) for record in _bad_records(result)
        ]
        path = self._output_dir / REJECTED_NAME
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        durable.write_bytes(path, lines.encode(errors="backslashreplace"))
        shown = "; ".join(_described(record) for record in records[:_SHOWN])
        raise UserError(
            f"{self._description}: {self._bad:,} of the {self._documents:,} documents read so far cannot be used,"
            f" more than --max_bad_fraction {self._fraction:g} allows: {shown}"
            f"{'; ...' if self._bad > _SHOWN else ''}; {path} has them all;"
            " mend the input or raise --max_bad_fraction, and run the same command again"
        )


def _described(record: dict[str, Any]) -> str:
    line = f":{record['line']}" if record.get("line") else ""
    return f"{record.get('file')}{line}: {record.get('reason')}"
