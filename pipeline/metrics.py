"""What a run leaves for people: `metrics.jsonl`, TensorBoard, and a progress bar or lines on the terminal."""

import json
import logging
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep import durable
from pipeline.distributions import Distribution

METRICS_NAME = "metrics.jsonl"
_LINE_SECONDS = 10.0
_MEASURED_STEPS = 10
"""After which the run's time is said; the first step, with all that is built in it, does not count."""


class Metrics:
    """Writes rank 0's metrics; on other ranks every method does nothing.

    first_step: steps done before this start. Lines and events of later steps, which a resumed run repeats, are
    dropped. monitor: DeepSpeed's, which writes the same numbers to what the ds_config names (csv_monitor, wandb, comet,
    a tensorboard of its own).
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        first_step: int,
        max_steps: int,
        enabled: bool,
        logger: logging.Logger,
        monitor: Any = None,
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = output_dir / METRICS_NAME
        if path.exists():
            kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) <= first_step]
            durable.write_bytes(path, b"".join(kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - closed by `close`
        self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1)
        self._monitor = monitor if monitor is not None and monitor.enabled else None
        self._logger = logger
        self._last_line = time.monotonic()
        self._bar = tqdm(
            total=max_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
        )
        self._max_steps = max_steps
        self._first_step, self._started = first_step, time.monotonic()
        self._steady = 0.0
        self._ended, self._end_of_session = False, None

    def step(self, values: dict[str, Any]) -> None:
        """Records one optimizer step; values as in DESIGN's `metrics.jsonl`."""
        if not self._enabled:
            return
        step = values["step"]
        self._file.write(json.dumps(values) + "\n")
        scalars = {tag: values.get(name) for name, tag in _TAGS.items()}
        for corpus, found in values.get("corpora", {}).items():
            scalars |= {f"{_CORPUS_TAGS[name]}/{corpus}": value for name, value in found.items()}
        self._scalars(step, scalars)
        rate = f"{values['tokens_per_second']:,.0f} tokens/s"
        waited = f"data wait {values['data_wait_seconds'] / values['step_seconds']:.1%}"
        self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate}, {waited}", False)
        self._bar.update(step - self._bar.n)
        self._say_speed(step, values["tokens_per_second"], values["step_seconds"])
        now = time.monotonic()
        if self._bar.disable and (now - self._last_line > _LINE_SECONDS or step == self._max_steps):
            self._last_line = now
            norm = "" if values["grad_norm"] is None else f"  grad norm {values['grad_norm']:.2f}"
            remaining = (now - self._started) / (step - self._first_step) * (self._max_steps - step)
            self._logger.info(
                f"step {step:>6}/{self._max_steps}  loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}"
                f"{norm}  {rate}  {waited}"
                f"  {tqdm.format_interval(remaining)} left"
            )

    def _say_speed(self, step: int, tokens_per_second: float, step_seconds: float) -> None:
        """Once, the rate of the steps after the first and how long the run's others take at it."""
        if step == self._first_step + 1:
            return
        self._steady += step_seconds
        measured, remaining = step - self._first_step - 1, self._max_steps - step
        if measured == _MEASURED_STEPS and remaining >= _MEASURED_STEPS:
            seconds = self._steady / measured
            self.say(
                f"speed     {tokens_per_second * step_seconds / seconds:,.0f} tokens/s, {seconds:.3g} s a step over"
                f" {measured} steps; the remaining {remaining:,} steps take"
                f" {tqdm.format_interval(seconds * remaining)}, evaluations and checkpoints aside"
            )

    def describe(self, hyperparameters: Mapping[str, bool | str | float]) -> None:
        """Makes the run a row of TensorBoard's table of hyperparameters, and lays out its page of custom scalars."""
        if not self._enabled:
            return
        from torch.utils.tensorboard.summary import hparams

        shown = {tag: float("nan") for tag in ("loss/validation", "loss/train")}
        *start, self._end_of_session = hparams(dict(hyperparameters), shown)
        for summary in start:
            self._board.file_writer.add_summary(summary, self._first_step)
        self._board.add_custom_scalars(_LAYOUT)

    def texts(self, step: int, texts: Sequence[str]) -> None:
        """Shows texts of several lines as they stand."""
        if self._enabled:
            for number, text in enumerate(texts):
                self._board.add_text(f"samples/{number}", textwrap.indent(text, "    "), step)

    def distribution(self, step: int, name: str, found: Distribution) -> None:
        """Shows how a parameter is distributed after a step, and how far the step moved it."""
        if self._enabled:
            self._board.add_histogram(f"weights/{name}", found.weights, step)
            self._board.add_scalar(f"weight_norm/{name}", found.norm, step)
            self._board.add_scalar(f"update_norm/{name}", found.update_norm, step)

    def left_out(self, values: dict[str, Any]) -> None:
        """Records a step that changed nothing: `step`, `samples` and `left_out`."""
        if self._enabled:
            self._file.write(json.dumps(values) + "\n")
            self._bar.update(values["step"] - self._bar.n)

    def _scalars(self, step: int, scalars: dict[str, float | None]) -> None:
        """Shows numbers by tag, where there are any."""
        events = [(tag, value, step) for tag, value in scalars.items() if value is not None]
        for tag, value, _ in events:
            self._board.add_scalar(tag, value, step)
        if self._monitor is not None:
            self._monitor.write_events(events)

    def say(self, line: str) -> None:
        """A line for the terminal and the log, around the progress bar."""
        if self._enabled:
            self._bar.clear()
            self._logger.info(line)

    def validation(self, step: int, values: dict[str, Any]) -> None:
        """Records an evaluation after `step` steps: `loss` (nats a token), and what else there is of it."""
        if not self._enabled:
            return
        self._file.write(json.dumps({"step": step, "validation": values}) + "\n")
        scalars = {tag: values.get(name) for name, tag in _VALIDATION_TAGS.items()}
        for corpus, loss in values.get("corpora", {}).items():
            scalars[f"loss/validation/{corpus}"] = loss
        self._scalars(step, scalars)
        average = f", of the averaged weights {values['ema_loss']:.4f}" if "ema_loss" in values else ""
        self.say(f"step {step:>6}/{self._max_steps}  validation loss {values['loss']:.4f}{average}")
        self._ended = step == self._max_steps

    def close(self) -> None:
        if self._enabled:
            if self._ended and self._end_of_session is not None:
                self._board.file_writer.add_summary(self._end_of_session, self._max_steps)
            self._bar.close()
            self._file.close()
            self._board.close()


_TAGS = {
    "loss": "loss/train",
    "pair_loss": "loss/train_pairs",
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "tokens_per_second": "throughput/tokens_per_second",
    "step_seconds": "throughput/step_seconds",
    "data_wait_seconds": "throughput/data_wait_seconds",
    "mfu": "throughput/mfu",
    "memory_bytes": "memory/bytes",
}


_VALIDATION_TAGS = {
    "loss": "loss/validation",
    "pair_loss": "loss/validation_pairs",
    "ema_loss": "loss/validation_ema",
    "perplexity": "validation/perplexity",
    "accuracy": "validation/accuracy",
    "bits_per_byte": "validation/bits_per_byte",
}
_CORPUS_TAGS = {"loss": "loss/train", "epochs": "epochs"}


# TensorBoard's page of custom scalars: what is looked at together.
_LAYOUT = {
    "loss": {
        "loss": ["Multiline", ["^loss/train$", "^loss/validation$", "^loss/validation_ema$"]],
        "validation": ["Multiline", ["validation/.*"]],
    },
    "throughput": {
        "tokens per second": ["Multiline", ["throughput/tokens_per_second"]],
        "seconds": ["Multiline", ["throughput/step_seconds", "throughput/data_wait_seconds"]],
        "mfu": ["Multiline", ["throughput/mfu"]],
    },
    "health": {
        "gradient norm": ["Multiline", ["optimizer/grad_norm"]],
        "learning rate": ["Multiline", ["optimizer/learning_rate"]],
        "memory": ["Multiline", ["memory/bytes"]],
    },
}


def _step_of(line: bytes) -> float:
    """The step of a metrics line; a torn last line counts as beyond every step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def recent_losses(output_dir: Path, step: int, count: int) -> list[float]:
    """The last `count` losses of a run's steps up to `step`, oldest first."""
    path = output_dir / METRICS_NAME
    lines = path.read_bytes().splitlines() if path.exists() else []
    found = [json.loads(line).get("loss") for line in lines if _step_of(line) <= step]
    return [loss for loss in found if loss is not None][-count:]


def read_validation(output_dir: Path, name: str = "loss") -> list[tuple[int, float]]:
    """(step, loss) of every evaluation that a run's metrics hold; with name "ema_loss", of the averaged weights."""
    found = []
    for line in (output_dir / METRICS_NAME).read_text().splitlines():
        record = json.loads(line)
        if name in record.get("validation", {}):
            found.append((record["step"], record["validation"][name]))
    return found
