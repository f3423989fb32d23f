"""How far a job is: a bar over bytes of input with documents/s, MB/s and ETA, and a line at the end."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

Report = Callable[[int, int], None]
"""Called by a part's function with (documents, bytes of input) done since its last call."""

REPORT_SECONDS = 0.25


def progress_bar(description: str, total: int | None, done: int = 0, unit: str = "B") -> "tqdm[Any]":
    """A bar over bytes of input (or another unit) on stderr, with rate and ETA; quiet lines where stderr is not a
    terminal."""
    return tqdm(
        desc=description,
        total=total,
        initial=done,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        file=sys.stderr,
    )


class Progress:
    """The bar of one phase of a job, over all who work on it.

    While a part is at work it counts what is reported of it; when it is done, all of its bytes.
    """

    def __init__(self, description: str, total_bytes: int, done_bytes: int) -> None:
        self._description = description
        self._reported: dict[int, tuple[int, int]] = {}
        self._done: set[int] = set()
        self._documents = self._bytes = 0
        self._started = time.monotonic()
        self._bar = progress_bar(description, total_bytes, done_bytes)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._bar.close()
        if kind is None and self._bytes:
            seconds = max(time.monotonic() - self._started, 1e-3)
            size, rate = f"{self._bytes / 1e6:,.1f} MB", f"{self._bytes / 1e6 / seconds:,.1f} MB/s"
            if self._documents:  # not of work on scratch files
                size = f"{self._documents:,} documents, {size}"
                rate = f"{self._documents / seconds:,.0f} documents/s, {rate}"
            print(f"{self._description}: {size} in {seconds:,.1f} s ({rate})", flush=True)

    def report(self, part: int, documents: int, size: int) -> None:
        """More of a part that is at work."""
        if part in self._done:  # a report may arrive after the result
            return
        before = self._reported.get(part, (0, 0))
        self._reported[part] = before[0] + documents, before[1] + size
        self._add(documents, size)

    def done(self, part: int, documents: int | None, size: int) -> None:
        """A part is done: `size` bytes and, where it is known, how many documents."""
        self._done.add(part)
        before = self._reported.pop(part, (0, 0))
        self._add(0 if documents is None else documents - before[0], size - before[1])

    def _add(self, documents: int, size: int) -> None:
        self._documents += documents
        self._bytes += size
        seconds = max(time.monotonic() - self._started, 1e-3)
        if self._documents:
            postfix = f"{self._documents:,} documents, {self._documents / seconds:,.0f} documents/s"
            self._bar.set_postfix_str(postfix, refresh=False)
        self._bar.update(size)

    def note(self, line: str) -> None:
        """Prints a line without spoiling the bar."""
        self._bar.clear()
        print(line, flush=True)
