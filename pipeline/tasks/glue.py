"""The nine tasks of GLUE (Wang et al. 2018): their files, labels and metrics, and the submission's files.

The tsv files are those that the benchmark gives out. They are not quoted: a quotation mark is a character, a tab always
ends a cell, and only a newline ends a line (texts hold U+2028 and U+0085, where `str.splitlines` would cut).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import durable
from data_prep.errors import UserError

HUB_NAME = "nyu-mll/glue"
# GLUE's scores of STS-B.
_LOWEST, _HIGHEST = 0.0, 5.0


@dataclass(frozen=True)
class Example:
    """One text or pair of texts.

    index: as the submission names it. second: None where the task has single texts. label: the number of its class, or
    its score; None where it is not given (test sets).
    """

    index: str
    first: str
    second: str | None
    label: float | None


@dataclass(frozen=True)
class GlueTask:
    """One task.

    folder: its name in the benchmark's archive. texts, label: columns of the tsv files. classes: as the files and the
    submission write them, in the order of the hub's numbers; none for a score. metrics: by name as in
    pipeline.tasks.metrics. dev: file of each held-out set; test: that of each file of the submission. hub_texts: the
    hub's columns. headerless: columns of train and dev files that do not name them. ragged: its training files hold
    lines without all columns, which every reader leaves out.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    hub_texts: tuple[str, ...]
    dev: Mapping[str, str] = field(default_factory=lambda: {"validation": "dev"})
    test: Mapping[str, str] = field(default_factory=dict)
    headerless: tuple[str, ...] = ()
    ragged: bool = False

    @property
    def is_regression(self) -> bool:
        return not self.classes

    @property
    def submissions(self) -> Mapping[str, str]:
        """File of the submission, without its ending -> test file, without its ending."""
        return self.test or {self.folder: "test"}


_ENTAILED = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": GlueTask(
        "CoLA",
        ("sentence",),
        "label",
        ("0", "1"),
        ("matthews",),
        ("sentence",),
        headerless=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask("SST-2", ("sentence",), "label", ("0", "1"), ("accuracy",), ("sentence",)),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("accuracy", "f1"), _PAIR),
    "stsb": GlueTask("STS-B", _PAIR, "score", (), ("pearson", "spearman"), _PAIR),
    "qqp": GlueTask(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("0", "1"),
        ("accuracy", "f1"),
        ("question1", "question2"),
        ragged=True,
    ),
    "mnli": GlueTask(
        "MNLI",
        _PAIR,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        ("premise", "hypothesis"),
        dev={"matched": "dev_matched", "mismatched": "dev_mismatched"},
        test={"MNLI-m": "test_matched", "MNLI-mm": "test_mismatched"},
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", _ENTAILED, ("accuracy",), ("question", "sentence")),
    "rte": GlueTask("RTE", _PAIR, "label", _ENTAILED, ("accuracy",), _PAIR),
    "wnli": GlueTask("WNLI", _PAIR, "label", ("0", "1"), ("accuracy",), _PAIR),
}
# The diagnostic set, whose labels a model of MNLI predicts, where the archive's tools leave it.
_DIAGNOSTIC = ("diagnostic/diagnostic.tsv", "AX/diagnostic.tsv", "AX/AX.tsv", "AX.tsv")


@dataclass(frozen=True)
class Splits:
    """Examples of one task. dev: by held-out set. test: by file of the submission; may be empty.

    left_out: lines of the training and dev files without all columns.
    """

    train: list[Example]
    dev: dict[str, list[Example]]
    test: dict[str, list[Example]]
    left_out: int = 0


def find_folder(task: GlueTask, data_dir: Path) -> Path | None:
    """Where the task's files are: `data_dir`/CoLA and the like, or `data_dir` itself; None when they are not there."""
    for folder in (data_dir / task.folder, data_dir):
        if (folder / "train.tsv").is_file() and (folder / f"{next(iter(task.dev.values()))}.tsv").is_file():
            return folder
    return None


def read_local(task: GlueTask, data_dir: Path) -> Splits:
    """The task's files below `data_dir`; test files may be missing.

    Raises UserError for a missing file, a header without the columns, a line without them (but for QQP's training
    files), or a label that the task has not, naming file and line.
    """
    folder = find_folder(task, data_dir)
    if folder is None:
        names = ", ".join(f"{name}.tsv" for name in ("train", *task.dev.values()))
        raise UserError(
            f"--data_dir {data_dir} holds no {task.folder}: expected {names} in it or in {data_dir / task.folder}"
        )
    left_out = 0

    def labelled(name: str) -> list[Example]:
        nonlocal left_out
        path = folder / f"{name}.tsv"
        found = []
        for line, row in _read_tsv(path, task.headerless, (*task.texts, task.label)):
            if row is None:
                if not task.ragged:
                    raise UserError(
                        f"{path}, line {line}: fewer cells than its columns; GLUE's own files have them all"
                    )
                left_out += 1
                continue
            found.append(_example(task, row, str(line), _label(task, row[task.label], f"{path}, line {line}")))
        if not found:
            raise UserError(f"{path} holds no examples")
        return found

    def unlabelled(path: Path) -> list[Example]:
        found: list[Example] = []
        for line, row in _read_tsv(path, (), task.texts):
            if row is None:
                raise UserError(f"{path}, line {line}: fewer cells than its columns; each needs a prediction")
            found.append(_example(task, row, str(len(found)), None))
        return found

    test_files = {name: folder / f"{stem}.tsv" for name, stem in task.submissions.items()}
    if task.folder == "MNLI":
        diagnostic = next((path for name in _DIAGNOSTIC if (path := folder.parent / name).is_file()), None)
        test_files |= {"AX": diagnostic} if diagnostic is not None else {}
    return Splits(
        train=labelled("train"),
        dev={name: labelled(stem) for name, stem in task.dev.items()},
        test={name: unlabelled(path) for name, path in test_files.items() if path.is_file()},
        left_out=left_out,
    )


def read_hub(name: str) -> Splits:
    """A task from the hub through `datasets`; raises UserError when it cannot be reached."""
    from datasets import load_dataset

    task = TASKS[name]
    try:
        loaded = load_dataset(HUB_NAME, name)
    except Exception as error:  # of its network, its cache or its file systems
        what = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{HUB_NAME} ({name}) cannot be loaded ({what}); give its tsv files with --data_dir, or a network"
        ) from None
    return splits_of_hub(task, loaded)


def splits_of_hub(task: GlueTask, loaded: Mapping[str, Iterable[Mapping[str, Any]]]) -> Splits:
    """Examples of rows with the hub's columns, by its names of the splits."""

    def examples(split: str) -> list[Example]:
        found = []
        for row in loaded[split]:
            first, *second = (row[column] for column in task.hub_texts)
            label = None if split.startswith("test") else float(row["label"])
            found.append(Example(str(row["idx"]), first, second[0] if second else None, label))
        return found

    dev = {name: stem.replace("dev", "validation") for name, stem in task.dev.items()}
    return Splits(
        train=examples("train"),
        dev={name: examples(split) for name, split in dev.items()},
        test={name: examples(split) for name, split in task.submissions.items() if split in loaded},
    )


def _read_tsv(
    path: Path, headerless: Sequence[str], needed: Sequence[str]
) -> Iterator[tuple[int, dict[str, str] | None]]:
    """(number from 1, cells by column) of each line behind the header; None for a line without the needed cells."""
    try:
        file = open(path, encoding="utf-8-sig", newline="\n")  # noqa: SIM115 - closed below; MRPC's files begin with a BOM
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    with file:
        columns = list(headerless)
        for number, line in enumerate(file, 1):
            cells = line.removesuffix("\n").removesuffix("\r").split("\t")
            if not columns:
                columns = cells
                missing = [name for name in needed if name not in columns]
                if missing:
                    raise UserError(f"{path}: its first line has no column {missing[0]!r}, only {', '.join(columns)}")
                continue
            whole = len(cells) > max(columns.index(name) for name in needed)
            yield number, dict(zip(columns, cells, strict=False)) if whole else None


def _example(task: GlueTask, row: Mapping[str, str], number: str, label: float | None) -> Example:
    first, *second = (row[name] for name in task.texts)
    index = row.get("index", row.get("id", number)) if label is None else number
    return Example(index, first, second[0] if second else None, label)


def _label(task: GlueTask, text: str, where: str) -> float:
    if not task.is_regression:
        if text not in task.classes:
            raise UserError(f"{where}: {task.label} is {text!r}, expected one of {', '.join(task.classes)}")
        return float(task.classes.index(text))
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    if not _LOWEST <= score <= _HIGHEST:
        raise UserError(f"{where}: {task.label} is {text!r}, expected a number from {_LOWEST:g} to {_HIGHEST:g}")
    return score


def write_submission(task: GlueTask, name: str, examples: list[Example], outputs: NDArray[Any], folder: Path) -> Path:
    """Writes `folder`/NAME.tsv as the benchmark's server takes it.

    outputs: logits [examples, classes], or scores [examples, 1], which are clipped to GLUE's range.
    """
    if task.is_regression:
        answers = [f"{score:.3f}" for score in np.clip(outputs[:, 0], _LOWEST, _HIGHEST)]
    else:
        answers = [task.classes[index] for index in outputs.argmax(-1)]
    lines = (f"{example.index}\t{answer}\n" for example, answer in zip(examples, answers, strict=True))
    path = folder / f"{name}.tsv"
    durable.write_bytes(path, ("index\tprediction\n" + "".join(lines)).encode())
    return path
