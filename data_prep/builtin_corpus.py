"""The built-in corpus: English docstrings of the Python standard library and of installed packages.

Real prose without a network. The files are parsed, never imported. One document is the docstrings of one file, in
their order; a docstring that an earlier file had already is left out, and so is what is not English prose.
"""

import argparse
import ast
import hashlib
import json
import re
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.errors import UserError
from data_prep.manifest import FileRecord, Manifest
from data_prep.parts import Execution, Report, Work, add_work_arguments, megabytes, working

SUMMARY = "Make documents from the docstrings of this machine's Python packages (a demo and test corpus)."
EXAMPLES = """\
  python -m data_prep builtin_corpus --output_dir data/documents
  python -m data_prep builtin_corpus --output_dir data/documents --max_megabytes 30
"""
KIND = "documents"
# In the order in which they are read until the corpus is large enough; "" is the standard library.
PACKAGES = (
    "",
    "numpy",
    "pandas",
    "torch",
    "transformers",
    "datasets",
    "deepspeed",
    "pyarrow",
    "sympy",
    "networkx",
)
_MINIMUM_CHARACTERS = 200
_OUTPUT_FILES = 4
_FILES_A_PART = 64
_WORD = re.compile(r"[A-Za-z]{2,}")
_COMMON_WORDS = frozenset(
    [
        "the",
        "of",
        "to",
        "and",
        "is",
        "in",
        "for",
        "a",
        "if",
        "that",
        "this",
        "with",
        "be",
        "or",
        "an",
        "as",
        "are",
        "by",
        "from",
        "it",
        "not",
        "on",
    ]
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, required=True, metavar="D", help="folder of the documents")
    parser.add_argument(
        "--max_megabytes",
        dest="max_bytes",
        type=megabytes,
        metavar="MB",
        default="8",
        help="stop reading packages at this size, in MB (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of the documents' order (default: %(default)s)")
    add_work_arguments(parser)


def source_files() -> list[tuple[str, Path]]:
    """(name, path) of every Python file of the standard library and of PACKAGES, in the order of reading."""
    standard, site = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    found = []
    for package in PACKAGES:
        root = site / package if package else standard
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(site if package else standard)
            skipped = {"site-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
            if not skipped.intersection(name.parts):
                found.append((name.as_posix(), path))
    return found


def docstrings(source: str) -> Iterator[str]:
    """The cleaned docstrings of a module's source, in their order; raises SyntaxError or ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text.strip()


def is_english_prose(text: str) -> bool:
    """True when at least a tenth of the words are among the commonest of English, and most of it is ASCII."""
    words = _WORD.findall(text)
    common = sum(word.lower() in _COMMON_WORDS for word in words)
    return len(words) >= 5 and common >= len(words) / 10 and sum(map(str.isascii, text)) > 0.95 * len(text)


def parse_files(files: list[tuple[str, str]], record: str, report: Report) -> dict[str, Any]:
    """Writes the docstrings of some files to `record`, a JSON line a file, and returns how many there were."""
    with durable.replacing(Path(record)) as output:
        for name, path in files:
            try:
                content = Path(path).read_bytes()
                texts = [text for text in docstrings(content.decode()) if is_english_prose(text)]
            except (SyntaxError, ValueError, RecursionError, OSError):
                texts = []  # templates, other Python versions, deliberately broken test files
                content = b""
            output.write(json.dumps([name, texts]).encode() + b"\n")
            report(1, len(content))
    return {"files": len(files)}


def builtin_corpus(output_dir: Path, *, max_bytes: int, seed: int = 1234, execution: Execution | None = None) -> None:
    """Writes about `max_bytes` of documents as JSONL, in an order drawn by `seed`.

    The same installation gives the same bytes whoever does it. Raises UserError when `output_dir` holds something
    else.
    """
    job = {"command": "builtin_corpus", "max_bytes": max_bytes, "seed": seed}
    started = time.monotonic()
    with working(output_dir, job, [], execution or Execution()) as work:
        if work is None:
            return
        records = _parse_all(work, _enough(source_files(), max_bytes))
        if work.finishes():
            content = _write(work, records, max_bytes, seed)
            print(
                f"{output_dir}: {content['documents']:,} documents, {content['text_bytes'] / 1e6:.1f} MB,"
                f" {content['duplicate_docstrings']:,} duplicate docstrings left out;"
                f" {time.monotonic() - started:.1f} s"
            )


def _parse_all(work: Work, files: list[tuple[str, Path]]) -> list[Path]:
    """The scratch files that hold the docstrings of `files`, in their order."""
    sizes = [path.stat().st_size for _, path in files]
    chunks = range(0, len(files), _FILES_A_PART)
    records = [work.scratch / f"docstrings-{start:06d}.jsonl" for start in chunks]
    work.run(
        parse_files,
        [
            ([(name, str(path)) for name, path in files[start : start + _FILES_A_PART]], str(record))
            for start, record in zip(chunks, records, strict=True)
        ],
        part_inputs=[[str(path) for _, path in files[start : start + _FILES_A_PART]] for start in chunks],
        part_bytes=[sum(sizes[start : start + _FILES_A_PART]) for start in chunks],
        description="read docstrings",
    )
    return records


def _write(work: Work, records: list[Path], max_bytes: int, seed: int) -> dict[str, int]:
    """Writes the documents and their manifest; returns its content."""
    documents, duplicates = _deduplicated(records, max_bytes)
    if not documents:
        raise UserError("this Python installation holds no docstrings (is it run with its sources stripped?)")
    # Related files stand side by side; a drawn order makes every stretch of the corpus, the held-out one
    # included, a fair sample of it.
    documents.sort(key=lambda document: hashlib.sha256(f"{seed} {document['id']}".encode()).digest())
    per_file = -(-len(documents) // _OUTPUT_FILES)
    written = {}
    for index in range(0, len(documents), per_file):
        path = work.output_dir / f"documents-{index // per_file:02d}.jsonl"
        with durable.replacing(path) as output:
            for document in documents[index : index + per_file]:
                output.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
        written[path.name] = FileRecord.of(path)
    size = sum(len(document["text"].encode()) for document in documents)
    content = {"documents": len(documents), "text_bytes": size, "duplicate_docstrings": duplicates}
    Manifest(kind=KIND, job=work.job, files=written, content=content).write(work.output_dir)
    return content


# Docstrings are about a fifth of a package's source; files beyond this multiple of the wanted size are not parsed.
_SOURCE_BYTES_A_TEXT_BYTE = 9


def _enough(files: list[tuple[str, Path]], max_bytes: int) -> list[tuple[str, Path]]:
    chosen, total = [], 0
    for name, path in files:
        if total > max_bytes * _SOURCE_BYTES_A_TEXT_BYTE:
            break
        total += path.stat().st_size
        chosen.append((name, path))
    return chosen


def _deduplicated(records: list[Path], max_bytes: int) -> tuple[list[dict[str, str]], int]:
    """One document a file, up to `max_bytes` of text; and how many docstrings had been seen before."""
    seen: set[bytes] = set()
    documents: list[dict[str, str]] = []
    size = duplicates = 0
    for record in records:
        for line in record.read_bytes().splitlines():
            name, texts = json.loads(line)
            fresh = []
            for text in texts:
                digest = hashlib.sha256(" ".join(text.split()).lower().encode()).digest()
                if digest in seen:
                    duplicates += 1
                else:
                    seen.add(digest)
                    fresh.append(text)
            document = "\n\n".join(fresh)
            if len(document) >= _MINIMUM_CHARACTERS and size < max_bytes:
                documents.append({"id": name, "text": document})
                size += len(document.encode())
    return documents, duplicates


def main(arguments: argparse.Namespace) -> None:
    builtin_corpus(
        arguments.output_dir,
        max_bytes=arguments.max_bytes,
        seed=arguments.seed,
        execution=Execution.of(arguments),
    )
