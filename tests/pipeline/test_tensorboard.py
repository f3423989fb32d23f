"""A real TensorBoard on the folders of two runs, looked at in a real browser."""

import json
import logging
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline.metrics import Metrics
from tests.browser import chromium, pixels
from tests.distributed.ranks import free_port

STEPS = 60
LOSSES = {"first": 6 * np.exp(-np.arange(STEPS) / 20), "second": 1 + 6 * np.exp(-np.arange(STEPS) / 20)}
RATES = {"first": 1e-3, "second": 1e-4}


@dataclass(frozen=True)
class Chart:
    """Where a page of 1,400 x 1,000 pixels has its first chart, and in its list of runs the colour of each."""

    rows: slice
    columns: slice
    colours: dict[str, tuple[int, int]]


TIME_SERIES = Chart(slice(300, 560), slice(370, 690), {"first": (186, 215), "second": (234, 215)})
CUSTOM_SCALARS = Chart(slice(155, 332), slice(425, 716), {"first": (482, 36), "second": (510, 36)})


def write_run(folder: Path, name: str) -> None:
    metrics = Metrics(folder, first_step=0, max_steps=STEPS, enabled=True, logger=logging.getLogger(__name__))
    metrics.describe({"optimizer.lr": RATES[name], "model.config": "demo-gpt"})
    metrics.texts(STEPS // 2, [f"{name} upon\na time"])
    for step, loss in enumerate(LOSSES[name], 1):
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
    metrics.validation(STEPS, {"loss": float(LOSSES[name][-1])})
    metrics.close()


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """(process, address) of `tensorboard --logdir RUNS`."""
    runs = tmp_path_factory.mktemp("runs")
    for name in LOSSES:
        (runs / name).mkdir()
        write_run(runs / name, name)
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


def answer(address: str, page: str, **question: object) -> Any:
    """What TensorBoard's own pages ask for, as they do."""
    request = urllib.request.Request(f"{address}/{page}")
    if question:
        request.data = json.dumps(question).encode()
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as found:
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


def test_texts_hyperparameters_and_the_layout_are_there(board):
    _, address = board
    (text,) = answer(address, "data/plugin/text/text?run=first%2Ftensorboard&tag=samples%2F0%2Ftext_summary")
    assert text["step"] == STEPS // 2 and "first upon\na time" in text["text"]
    layout = answer(address, "data/plugin/custom_scalars/layout")
    assert [category["title"] for category in layout["category"]] == ["loss", "throughput", "health"]
    asked = {"experimentName": "", "startIndex": 0, "sliceSize": 10, "colParams": []}
    asked["allowedStatuses"] = [f"STATUS_{one}" for one in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    found = answer(address, "data/plugin/hparams/session_groups", **asked)
    rates = {group["sessions"][0]["name"]: group["hparams"]["optimizer.lr"] for group in found["sessionGroups"]}
    assert rates == {f"{name}/tensorboard": rate for name, rate in RATES.items()}


def test_it_listens_on_the_loopback_alone(board):
    process, _ = board
    started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    listening = [found.laddr.ip for one in started for found in one.net_connections() if found.status == "LISTEN"]
    assert listening and set(listening) <= {"127.0.0.1", "::1"}


def looked_at(address: str, page: str, folder: Path) -> np.ndarray:
    """A page's pixels [1000, 1400, 3], once nothing moves in it any more."""
    shot = folder / f"{page}.png"
    size, patience = "--window-size=1400,1000", "--virtual-time-budget=60000"
    chromium(folder, f"--screenshot={shot}", size, patience, f"{address}/?forceSVG=true#{page}")
    image = pixels(shot.read_bytes())
    assert image.shape == (1000, 1400, 3)
    return image


def curve(image: np.ndarray, colour: np.ndarray, chart: Chart) -> np.ndarray:
    """How far down the pixels of that colour are in each column of the chart [columns]; NaN where there are none."""
    near = np.abs(image[chart.rows, chart.columns] - colour).sum(axis=2) < 60  # lines are smoothed at their edges
    rows = (near * np.arange(len(near))[:, None]).sum(axis=0)
    return np.where(near.any(axis=0), rows / np.maximum(near.sum(axis=0), 1), np.nan)


@pytest.mark.parametrize(("page", "chart"), [("timeseries", TIME_SERIES), ("custom_scalars", CUSTOM_SCALARS)])
def test_the_browser_shows_a_falling_curve_for_each_run(page, chart, board, tmp_path):
    """The loss of each run in its own colour, from the upper left to the lower right, the second above the first."""
    image = looked_at(board[1], page, tmp_path)
    colours = {name: image[place] for name, place in chart.colours.items()}
    assert np.abs(colours["first"] - colours["second"]).sum() > 100
    assert all(np.ptp(colour) > 20 for colour in colours.values()), "neither grey nor white"
    curves = {name: curve(image, colour, chart) for name, colour in colours.items()}
    for found in curves.values():
        drawn = found[~np.isnan(found)]
        assert len(drawn) > 0.6 * len(found), "no curve across the chart"
        assert drawn[:20].mean() + 60 < drawn[-20:].mean(), "a loss that falls goes down"
    assert np.nanmedian(curves["first"] - curves["second"]) > 10


def test_the_browser_shows_a_table_of_hyperparameters(board, tmp_path):
    """Below its head a row of words for each run, and nothing where charts would be."""
    image = looked_at(board[1], "hparams", tmp_path)
    inked = (image[190:1000, 300:1300].sum(axis=2) < 300).any(axis=1)
    beginnings = np.flatnonzero(inked[1:] & ~inked[:-1])
    assert len(beginnings) == 2 and beginnings[-1] < 100
    for chart in (TIME_SERIES, CUSTOM_SCALARS):
        part = image[slice(300, 560), chart.columns]
        assert (part == part[0, 0]).all(), "an empty page has no curves"
