"""A real TensorBoard on the folders of two runs, looked at in a real browser."""

import json
import logging
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.metrics import Metrics
from tests.browser import chromium, pixels
from tests.distributed.ranks import free_port

STEPS = 60
LOSSES = {"first": 6 * np.exp(-np.arange(STEPS) / 20), "second": 1 + 6 * np.exp(-np.arange(STEPS) / 20)}
DOTS = {"first": (186, 255), "second": (234, 255)}  # row, column of a run's colour in the list, which is by name


def write_run(folder: Path, losses: np.ndarray) -> None:
    metrics = Metrics(folder, first_step=0, max_steps=STEPS, enabled=True, logger=logging.getLogger(__name__))
    for step, loss in enumerate(losses, 1):
        metrics.step(
            {
                "step": step,
                "loss": float(loss),
                "learning_rate": 1e-3,
                "grad_norm": 1.0,
                "tokens": 256,
                "samples": 8 * step,
                "step_seconds": 0.1,
                "data_wait_seconds": 0.001,
                "tokens_per_second": 2560.0,
                "memory_bytes": 10**9,
                "mfu": None,
            }
        )
    metrics.validation(STEPS, {"loss": float(losses[-1])})
    metrics.close()


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """(process, address) of `tensorboard --logdir RUNS`."""
    runs = tmp_path_factory.mktemp("runs")
    for name, losses in LOSSES.items():
        (runs / name).mkdir()
        write_run(runs / name, losses)
    port = str(free_port())
    program = Path(sys.executable).parent / "tensorboard"
    process = subprocess.Popen([program, "--logdir", runs, "--port", port], stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                if len(answer(address, "data/runs")) == len(LOSSES):
                    break
            except OSError:
                assert process.poll() is None, "tensorboard has ended"
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield process, address
    finally:
        process.terminate()
        process.wait(timeout=60)


def answer(address: str, page: str) -> object:
    with urllib.request.urlopen(f"{address}/{page}", timeout=60) as found:
        return json.load(found)


def test_runs_are_compared_by_name_and_have_their_numbers(board):
    _, address = board
    tags = answer(address, "data/plugin/scalars/tags")
    assert set(tags) == {"first/tensorboard", "second/tensorboard"}
    for run in tags.values():
        assert {"loss/train", "loss/validation", "optimizer/learning_rate", "throughput/tokens_per_second"} <= set(run)
    for name, losses in LOSSES.items():
        points = answer(address, f"data/plugin/scalars/scalars?tag=loss%2Ftrain&run={name}%2Ftensorboard")
        assert [step for _, step, _ in points] == list(range(1, STEPS + 1))
        assert [loss for _, _, loss in points] == pytest.approx(list(losses), rel=1e-6)


def test_it_listens_on_the_loopback_alone(board):
    process, _ = board
    started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    listening = [found.laddr.ip for one in started for found in one.net_connections() if found.status == "LISTEN"]
    assert listening and set(listening) <= {"127.0.0.1", "::1"}


def columns(image: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Where in the picture a curve of that colour runs: the mean row of its pixels in each column of the first card
    [width], NaN in columns without one."""
    near = np.abs(image - colour).sum(axis=2) < 60  # lines are smoothed at their edges
    near[:300] = near[560:] = near[:, :300] = near[:, 700:] = False  # around it are dots of the colour, and words
    rows = np.where(near, np.arange(len(near))[:, None], 0).sum(axis=0)
    return np.where(near.any(axis=0), rows / np.maximum(near.sum(axis=0), 1), np.nan)


def test_the_browser_shows_a_falling_curve_for_each_run(board, tmp_path):
    """The loss of each run in its own colour, from the upper left to the lower right; and where there is none, none."""
    _, address = board

    def looked_at(query: str) -> np.ndarray:
        shot = tmp_path / "page.png"
        page = f"{address}/?forceSVG=true{query}#timeseries"
        size = "--window-size=1400,1000"
        chromium(tmp_path, f"--screenshot={shot}", size, "--virtual-time-budget=60000", page)
        image = pixels(shot.read_bytes())
        assert image.shape == (1000, 1400, 3)
        return image

    image = looked_at("")
    colours = {name: image[place] for name, place in DOTS.items()}
    assert np.abs(colours["first"] - colours["second"]).sum() > 100 and all(
        np.ptp(one) > 20 for one in colours.values()
    )
    found = {name: columns(image, colour) for name, colour in colours.items()}
    for curve in found.values():
        drawn = curve[~np.isnan(curve)]
        assert len(drawn) > 200, "no curve across the chart"
        assert drawn[:20].mean() + 100 < drawn[-20:].mean(), "a loss that falls goes down"
    both = ~np.isnan(found["first"]) & ~np.isnan(found["second"])
    lower = (found["first"] - found["second"])[both]
    assert np.median(lower) > 10, "the second run's loss is above the first's"
    without = looked_at("&tagFilter=nothing")
    for name, colour in colours.items():
        assert (without[DOTS[name]] == colour).all() and np.isnan(columns(without, colour)).all(), "an empty page"
