"""What rank 0 says and writes of a run; other ranks write nothing."""

import logging

import pytest

from pipeline.metrics import Metrics

HYPERPARAMETERS = {"lr": 1e-3, "objective": "causal"}


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO)
    return lambda word: [message for message in caplog.messages if word in message]


def recorded(tmp_path, steps, *, first_step=0, enabled=True):
    metrics = Metrics(
        tmp_path, first_step=first_step, max_steps=steps, enabled=enabled, logger=logging.getLogger("test_metrics")
    )
    metrics.describe(HYPERPARAMETERS)
    metrics.texts(0, ["a text"])
    for step in range(first_step + 1, steps + 1):
        seconds = 60.0 if step == first_step + 1 else 2.0
        values = {"step": step, "loss": 3.0, "learning_rate": 1e-3, "grad_norm": 1.0, "step_seconds": seconds,
                  "tokens_per_second": 1000 / seconds, "data_wait_seconds": 0.0}  # fmt: skip
        metrics.step(values)
    metrics.validation(steps, {"loss": 3.0, "ema_loss": 2.5})
    metrics.close()


def test_the_time_of_the_run_is_said_once_from_the_steps_after_the_first(tmp_path, lines):
    recorded(tmp_path, 41, first_step=10)
    (line,) = lines("speed ")
    assert "500 tokens/s, 2 s a step over 10 steps; the remaining 20 steps take 00:40" in line


def test_a_run_too_short_to_measure_says_nothing_of_its_time(tmp_path, lines):
    recorded(tmp_path, 11)
    assert not lines("speed ") and lines("validation loss 3.0000, of the averaged weights 2.5000")


def test_ranks_but_the_first_write_nothing(tmp_path, lines):
    recorded(tmp_path, 12, enabled=False)
    assert not list(tmp_path.iterdir()) and not lines("")
