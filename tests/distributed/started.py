"""A run under the launcher that is still going, to be killed, stopped or asked for something."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.distributed.ranks import ROOT, free_port

FAULTY_RUN = "tests/distributed/faulty_run.py"


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, but for a last line that was torn."""
    found = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in found if line.endswith("\n")]


def last_step(run: Path, rank: int) -> int:
    """The last step that a rank of a `faulty_run` has done, in any of its starts."""
    found = lines(run / "digests" / f"rank_{rank}.jsonl")
    return int(found[-1]["step"]) if found else 0


def last_digests(run: Path) -> list[dict[str, Any]]:
    """What both ranks say of their states around the last step."""
    return [lines(run / "digests" / f"rank_{rank}.jsonl")[-1] for rank in (0, 1)]


class Started:
    """Two ranks under `deepspeed`: `front`, its child `launcher` (launch.py) and that one's children `ranks`.

    A context: whatever ends the block, no process of the run is left behind it.
    """

    def __init__(self, ds_config: str, recipe: Path, run: Path, faults: Any, *flags: object, script: str = FAULTY_RUN):
        self.run = run
        command = [
            str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_port",
            str(free_port()), script, "--faults", json.dumps(faults), "--deepspeed_config", ds_config, "--recipe",
            str(recipe), "--output_dir", str(run), *map(str, flags),
        ]  # fmt: skip
        run.parent.mkdir(parents=True, exist_ok=True)
        self.output = run.with_suffix(".output")
        self._done = [len(lines(run / "digests" / f"rank_{rank}.jsonl")) for rank in (0, 1)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        self.ranks: list[psutil.Process] = []

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        family = list(self.ranks)
        with contextlib.suppress(psutil.NoSuchProcess):
            family += psutil.Process(self.process.pid).children(recursive=True)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()

    def wait_for_steps(self, steps: int) -> bool:
        """Returns when all ranks have done so many steps in this start, and the processes are known; False if the run
        ended before."""
        for rank, before in enumerate(self._done):
            while len(lines(self.run / "digests" / f"rank_{rank}.jsonl")) < before + steps:
                if self.process.poll() is not None:
                    return False
                time.sleep(0.1)
        try:
            self.front = psutil.Process(self.process.pid)
            [self.launcher] = self.front.children()
            self.ranks = sorted(self.launcher.children(), key=lambda process: int(process.environ()["RANK"]))
        except (psutil.Error, ValueError):
            return False
        return len(self.ranks) == 2

    def finish(self, patience: float = 300.0) -> tuple[int | None, int]:
        """The exit status (None: none came), and how many processes had to be killed after `patience` seconds."""
        family = [self.launcher, *self.ranks]
        try:
            status: int | None = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            status = None
        _, left = psutil.wait_procs(family, timeout=120 if status is not None else 0)
        for process in left:
            process.kill()
        return status, len(left)
