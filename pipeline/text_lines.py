"""Text that goes through a model line by line: read from a file or stdin, written to a file or stdout."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep import durable
from data_prep.errors import UserError

STDIN = "-"


def read_lines(name: str) -> Iterator[str]:
    """The lines of a UTF-8 file, or of stdin ("-"), without their ends; raises UserError for another encoding."""
    with open(name, "rb") if name != STDIN else contextlib.nullcontext(sys.stdin.buffer) as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.removesuffix(b"\n").removesuffix(b"\r").decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{name}, line {number}: {error}; expected UTF-8") from None


def in_groups(lines: Iterator[str], size: int) -> Iterator[list[str]]:
    """Lines some at a time, so that memory does not grow with the file."""
    while group := list(itertools.islice(lines, size)):
        yield group


@contextlib.contextmanager
def writing(path: Path | None) -> Iterator[Callable[[str], object]]:
    """A function that writes text: to a file, whole under its name at the end of the block, or to stdout (None)."""
    if path is None:
        yield sys.stdout.write
        sys.stdout.flush()
        return
    with durable.replacing(path) as file:
        yield lambda text: file.write(text.encode())


def bar(description: str, unit: str, total: int | None = None) -> "tqdm[Any]":
    """A progress bar on stderr, where that is a terminal."""
    return tqdm(
        desc=description, total=total, unit=unit, unit_scale=True, dynamic_ncols=True, file=sys.stderr,
        disable=not sys.stderr.isatty(),
    )  # fmt: skip
