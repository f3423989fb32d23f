"""What a run does about steps that go wrong: left out, reported, or taken back with the samples since the checkpoint.

`incidents.jsonl` in the run's folder has one object for each, durable before the run goes on. It is part of what the
run is: a start reads it, leaves the same steps out again and passes over the same samples, so that a run that was
killed and resumed is the run that was not.
"""

import json
import math
import os
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.durable import fsync_folder
from data_prep.errors import UserError
from pipeline.batch import BatchPlan
from pipeline.engine import Site, StepResult
from pipeline.recipe import FaultsSection, Recipe
from pipeline.stages import BatchSizes

INCIDENTS_NAME = "incidents.jsonl"
WINDOW = 64
_ENOUGH = 32  # losses, before one of them can be a spike
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_SMALLEST_DEVIATION = 1e-3  # of the median: losses of a model that repeats itself hardly differ
_MAX_ROLLBACKS = 3  # to one step
_SKIPPED = ("non_finite_loss", "non_finite_gradient")

Action = Literal["go_on", "rollback", "stop"]


@dataclass
class History:
    """What `incidents.jsonl` says of the run as it is now.

    skipped: steps, as metrics.jsonl counts them, that were left out; spikes: those of spikes. row: the former since the
    last time that the run was taken back. skip_samples: as training.skip_samples. rollbacks: how often to which step.
    """

    skipped: set[int] = field(default_factory=set)
    spikes: set[int] = field(default_factory=set)
    row: set[int] = field(default_factory=set)
    skip_samples: dict[int, int] = field(default_factory=dict)
    rollbacks: Counter[int] = field(default_factory=Counter)

    def skips_before(self, step: int) -> int:
        """How many steps in a row, up to `step`, were left out."""
        row = 0
        while step - row in self.row:
            row += 1
        return row


def read_history(output_dir: Path) -> History:
    """Reads a run's incidents; a torn last line, which the run did not go on from, is passed over.

    Raises UserError for another line that is not ours.
    """
    path = output_dir / INCIDENTS_NAME
    history = History()
    if not path.exists():
        return history
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            if not line:
                continue
            found = json.loads(line)
            kind, step = found["kind"], int(found["step"])
            if kind in _SKIPPED:
                history.skipped.add(step)
                history.row.add(step)
            elif kind == "spike":
                history.spikes.add(step)
            elif kind in ("rollback", "stop"):
                # What came after the checkpoint is decided anew.
                history.skipped = {skipped for skipped in history.skipped if skipped <= found["to"]}
                history.spikes = {spike for spike in history.spikes if spike <= found["to"]}
                history.row = set()
            if kind == "rollback":
                history.skip_samples[int(found["to"])] = int(found["skip_samples"])
                history.rollbacks[int(found["to"])] += 1
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is damaged ({error!r}); restore it from a copy") from None
    return history


def forget(output_dir: Path) -> None:
    """Removes what an earlier run in this folder met, which a new one is not to repeat."""
    (output_dir / INCIDENTS_NAME).unlink(missing_ok=True)


def passed_over(recipe: Recipe, history: History) -> Recipe:
    """The recipe with the samples that rollbacks have skipped."""
    if not history.skip_samples:
        return recipe
    skipped = {**(recipe.training.skip_samples or {}), **history.skip_samples}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"skip_samples": skipped})})


class Spikes:
    """Tells losses that stand out. losses: of the last steps of the run, oldest first."""

    def __init__(self, zscore: float | None, losses: Iterable[float]) -> None:
        self._zscore = zscore
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._in_one = False
        for loss in losses:
            self.look(loss)

    def look(self, loss: float) -> float | None:
        """The robust z-score of a spike's first loss, else None (Iglewicz & Hoaglin 1993: median and MAD)."""
        found = None
        if self._zscore is not None and len(self._window) >= _ENOUGH:
            median = statistics.median(self._window)
            deviation = _MAD_TO_DEVIATION * statistics.median(abs(one - median) for one in self._window)
            score = (loss - median) / max(deviation, _SMALLEST_DEVIATION * abs(median), 1e-12)
            if score > self._zscore and not self._in_one:
                found = score
            self._in_one = score > self._zscore
        self._window.append(loss)
        return found


def samples_of(step: int, sites: Iterable[Site], sizes: BatchSizes, batches: BatchPlan) -> list[int]:
    """What micro-batches of step `step`, from 0, hold, numbered within the step as `pipeline.trace --sample` does; all
    of the step where no site is given (as `pipeline.loader.step_batches` deals them out)."""
    micro, world = batches.micro_batch_size, batches.world_size
    found = [(site.micro_batch * world + site.rank) * micro + row for site in sites for row in range(micro)]
    return sorted(found) or list(range(sizes.at(step)))


class Judge:
    """Judges steps, on every rank alike, and on rank 0 writes down what it finds.

    history: of the run up to here. losses: of its last steps. last_saved: gives the step of the newest checkpoint.
    say: a line for the terminal.
    """

    def __init__(
        self,
        output_dir: Path,
        section: FaultsSection,
        history: History,
        *,
        losses: Iterable[float],
        first_step: int,
        last_saved: Callable[[], int],
        sizes: BatchSizes,
        batches: BatchPlan,
        is_first: bool,
        say: Callable[[str], None],
    ) -> None:
        self._path, self._section, self._history = output_dir / INCIDENTS_NAME, section, history
        self._spikes = Spikes(section.spike_zscore, losses)
        self._row = history.skips_before(first_step)
        self._last_saved = last_saved
        self._sizes, self._batches = sizes, batches
        self._is_first, self._say = is_first, say
        if is_first and self._path.exists():
            whole = self._path.read_bytes().rfind(b"\n") + 1
            os.truncate(self._path, whole)  # a line that a kill tore off

    def left_out(self, step: int) -> bool:
        """Whether the run has left `step` out before, and does so again."""
        return step in self._history.skipped

    def look(self, step: int, result: StepResult) -> Action:
        """Judges step `step`, counted from 1. Raises UserError where the run is to end."""
        if result.applied and not result.non_finite:
            self._row = 0
            score = self._spikes.look(result.losses.loss)
            if score is None:
                return "go_on"
            if step not in self._history.spikes:
                self._record(step, "spike", result, zscore=score)
            return self._rollback(step, "a spike") if self._section.on_spike == "rollback" else "go_on"
        if result.scaling:
            return "go_on"
        if result.applied:
            self._record(step, "non_finite_applied", result)
            raise UserError(
                f"the loss is {result.losses.loss} at step {step}, and the weights were changed: this ds_config turns"
                " off the check of gradients; leave out zero_optimization.compute_grad_norm and"
                " bf16.check_grad_overflow; the same command goes on from the newest checkpoint"
            )
        self._row += 1
        if not self.left_out(step):
            self._record(step, _SKIPPED[0] if result.non_finite else _SKIPPED[1], result)
        if self._row < self._section.max_skips:
            return "go_on"
        what = f"{self._row} steps in a row, up to {step}, that were left out"
        if self._section.on_skips == "rollback":
            return self._rollback(step, what)
        self._write({"step": step, "kind": "stop", "to": self._last_saved()})
        raise UserError(
            f"{what}: their loss or gradients are not finite (faults.max_skips {self._section.max_skips}); see what"
            f" they were trained on with `python -m pipeline.trace --output_dir {self._path.parent} --step {step}"
            " --text`; the same command goes on from the newest checkpoint, with --faults.on_skips rollback past these"
            " samples; if it comes back, start anew with a lower optimizer.lr"
        )

    def _rollback(self, step: int, why: str) -> Action:
        to = self._last_saved()
        if self._history.rollbacks[to] >= _MAX_ROLLBACKS:
            self._write({"step": step, "kind": "stop", "to": to})
            raise UserError(
                f"{why}, and the run went back to step {to} {_MAX_ROLLBACKS} times already; look at"
                f" {self._path} and the samples that it names, or start anew with a lower optimizer.lr"
            )
        before = self._sizes.left_out.get(to, 0)
        skipped = self._sizes.consumed(step) - self._sizes.first_sample(to)
        self._write({"step": step, "kind": "rollback", "to": to, "skip_samples": before + skipped})
        self._say(f"step {step:>6}  {why}: back to step {to}, past {skipped:,} samples")
        return "rollback"

    def _record(self, step: int, kind: str, result: StepResult, **more: Any) -> None:
        norm = result.grad_norm
        samples = samples_of(step - 1, result.non_finite, self._sizes, self._batches)
        self._write(
            {
                "step": step,
                "kind": kind,
                "loss": _number(result.losses.loss),
                "grad_norm": norm if norm is not None or kind == "spike" else "nan",
                "sites": [{"rank": site.rank, "micro_batch": site.micro_batch} for site in result.non_finite],
                "samples": samples,
                **more,
            }
        )
        if kind == "spike":
            self._say(f"step {step:>6}  a spike: loss {result.losses.loss:.4f}, {more['zscore']:.0f} deviations up")
            return
        ranks = ", ".join(str(rank) for rank in sorted({site.rank for site in result.non_finite}))
        where = f" on rank {ranks}" if ranks else ""
        what = "loss" if result.non_finite else "gradient norm"
        done = "left out" if not result.applied else "NOT left out"
        self._say(f"step {step:>6}  {done}: its {what} is not finite{where} ({self._row} in a row); {self._path.name}")

    def _write(self, record: Mapping[str, Any]) -> None:
        if not self._is_first:
            return
        line = json.dumps({**record, "time": time.time()}, allow_nan=False) + "\n"
        with open(self._path, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(self._path.parent)


def _number(value: float) -> float | str:
    """JSON has no numbers that are not finite."""
    return value if math.isfinite(value) else str(value)
