"""What fine-tuning leaves: metrics and curves while it goes on, results and their table at the end."""

import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.tasks.glue import TASKS

if TYPE_CHECKING:
    from pipeline.tasks.task import Task

RESULTS_NAME = "results.json"
PREDICTIONS_NAME = "predictions"
_BOARD_NAME = "tensorboard"


class Records:
    """`metrics.jsonl`, TensorBoard and the progress bar of rank 0; elsewhere every method does nothing."""

    def __init__(self, folder: Path, *, enabled: bool) -> None:
        self._enabled, self._folder = enabled, folder
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS_NAME).unlink(missing_ok=True)  # of another run, which this one replaces
        for name in (PREDICTIONS_NAME, _BOARD_NAME):
            shutil.rmtree(folder / name, ignore_errors=True)
        self._file = open(folder / "metrics.jsonl", "w", buffering=1)  # noqa: SIM115 - closed by `close`
        self._board: Any = None
        self._bar: Any = None

    def begin(self, seed: int, title: str, steps: int) -> None:
        if not self._enabled:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self._end()
        self._seed = seed
        self._board = SummaryWriter(str(self._folder / _BOARD_NAME / f"seed-{seed}"))
        self._bar = tqdm(
            total=steps, desc=title, unit="step", dynamic_ncols=True, file=sys.stderr, disable=not sys.stderr.isatty()
        )

    def step(self, step: int, epoch: float, **values: float | None) -> None:
        if not self._enabled:
            return
        self._file.write(json.dumps({"seed": self._seed, "step": step, "epoch": epoch, **values}) + "\n")
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(f"train/{name}", value, step)
        self._bar.update()

    def evaluation(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        if not self._enabled:
            return
        self._file.write(json.dumps({"seed": self._seed, "step": step, "epoch": epoch, "dev": metrics}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(f"dev/{name}", value, step)
        self._bar.clear()

    def _end(self) -> None:
        if self._board is not None:
            self._board.close()
            self._bar.close()

    def close(self) -> None:
        if self._enabled:
            self._end()
            self._file.close()


def read_results(folder: Path) -> dict[str, Any] | None:
    """What a finished run left, None where there is none."""
    try:
        return dict(json.loads((folder / RESULTS_NAME).read_bytes()))
    except FileNotFoundError:
        return None


def describe_metrics(task: "Task", metrics: dict[str, float]) -> str:
    """The metrics that the task's table shows."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name in task.shown)


def _task_score(results: dict[str, Any]) -> float:
    """A GLUE task's score: the mean of its metrics' medians over the seeds."""
    return statistics.fmean(results["median"].values())


def average(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of the tasks' scores: of all, and without WNLI, as Devlin et al. 2019, table 1, leave it out."""
    scores = {name: _task_score(found) for name, found in results.items()}
    without = [score for name, score in scores.items() if name != "wnli"]
    found = {"all": statistics.fmean(scores.values())}
    return found | ({"without_wnli": statistics.fmean(without)} if without else {})


def table(results: dict[str, dict[str, Any]], *, whole: bool) -> list[str]:
    """Lines with each task's metrics: the median over the seeds and the best seed's. whole: with GLUE's average."""
    lines = [f"{'task':<14}{'metric':<24}{'median':>9}{'best':>9}  of seeds"]
    for name in TASKS if whole else results:
        if name not in results:
            lines.append(f"{TASKS[name].folder:<14}{'no files':<24}{'-':>9}{'-':>9}")
            continue
        found = results[name]
        seeds = ", ".join(found["seeds"])
        for index, metric in enumerate(found["shown"]):
            title = found["title"] if index == 0 else ""
            # What needs the finished model, such as generated texts, there is of the best seed alone.
            median = f"{found['median'][metric]:.4f}" if metric in found["median"] else "-"
            best = (found["best"]["metrics"] | found["saved_model"])[metric]
            lines.append(f"{title:<14}{metric:<24}{median:>9}{best:>9.4f}  {'' if index else seeds}".rstrip())
    if whole:
        for name, value in average(results).items():
            of = f"of {len(results)} tasks" if name == "all" else "without WNLI"
            lines.append(f"{'average':<14}{of:<24}{value:>9.4f}")
    return lines
