"""What a run leaves for people: `metrics.jsonl`, TensorBoard, and a progress bar or lines on the terminal."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep import durable

METRICS_NAME = "metrics.jsonl"
_LINE_SECONDS = 10.0


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

    def close(self) -> None:
        if self._enabled:
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
    "bits_per_byte": "validation/bits_per_byte",
}
_CORPUS_TAGS = {"loss": "loss/train", "epochs": "epochs"}


def _step_of(line: bytes) -> float:
    """The step of a metrics line; a torn last line counts as beyond every step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_validation(output_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of every evaluation that a run's metrics hold."""
    found = []
    for line in (output_dir / METRICS_NAME).read_text().splitlines():
        record = json.loads(line)
        if "validation" in record:
            found.append((record["step"], record["validation"]["loss"]))
    return found
