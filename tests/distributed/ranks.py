"""Starts the product as its users do: real ranks under DeepSpeed's real launcher."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Small enough for seconds, large enough that every kind of parameter is there.
MODELS = {
    "causal": {"base": "demo-gpt", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
    "mlm": {
        "base": "bert-base",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    },
}
DROPOUT = {
    "causal": {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
    "mlm": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
}
NO_DROPOUT = {objective: dict.fromkeys(names, 0.0) for objective, names in DROPOUT.items()}


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    ranks: int, script: str | Path, *arguments: object, check: bool = True, launcher: Sequence[object] = ()
) -> Finished:
    """`deepspeed --num_accelerators RANKS SCRIPT ARGUMENTS...`; with `check`, a failure fails the test.

    launcher: more of `deepspeed`'s own arguments.
    """
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        *map(str, launcher),
        str(script),
        *map(str, arguments),
    ]
    places = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    finished = Finished(done.returncode, done.stdout, done.stderr)
    if check and done.returncode:
        pytest.fail(f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return finished


def run_ranks(ranks: int, script: str | Path, *arguments: object, check: bool = True) -> Finished:
    """Ranks without the launcher, which costs 3 s: as it starts them, with the first status that is not 0.

    With `check`, a failure fails the test.
    """
    port, processes = str(free_port()), []
    places = [str(ROOT), os.environ.get("PYTHONPATH")]
    with contextlib.ExitStack() as stack:
        for rank in range(ranks):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
            environment = {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
            files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
            process = subprocess.Popen(
                [sys.executable, "-u", str(script), *map(str, arguments)],
                cwd=ROOT,
                env={
                    **os.environ,
                    **environment,
                    "MASTER_PORT": port,
                    "PYTHONPATH": os.pathsep.join(filter(None, places)),
                },
                stdout=files[0],
                stderr=files[1],
            )
            stack.callback(process.kill)
            processes.append((process, files))
        statuses = [process.wait(timeout=900) for process, _ in processes]
        shown = ["", ""]
        for _, files in processes:
            for number, file in enumerate(files):
                file.seek(0)
                shown[number] += file.read()
    finished = Finished(next((status for status in statuses if status), 0), *shown)
    if check and finished.status:
        pytest.fail(f"exit status {finished.status}\n{finished.stdout[-3000:]}\n{finished.stderr[-6000:]}")
    return finished


def pretrain(
    ranks: int,
    ds_config: str,
    recipe: Path,
    output_dir: Path,
    *flags: object,
    check: bool = True,
    start: Callable[..., Finished] = run_ranks,
) -> Finished:
    """Trains; `start=launch` under the launcher, where that is what a test is about."""
    return start(
        ranks, "pipeline/pretrain.py", "--deepspeed_config", ds_config, "--recipe", recipe,
        "--output_dir", output_dir, *flags, check=check,
    )  # fmt: skip


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The steps of a run's metrics.jsonl."""
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Waits for something to be true; fails the test after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds:.0f} s"
        time.sleep(0.05)


def relative_difference(left: float, right: float) -> float:
    return abs(left - right) / abs(right)


def ds_config_with(path: Path, base: str, **changes: Any) -> Path:
    """A shipped ds_config with some top-level keys changed, written to `path`."""
    config = json.loads((ROOT / "ds_configs" / base).read_text())
    path.write_text(json.dumps({**config, **changes}))
    return path


def without_last_checkpoint(source: Path, target: Path, step: int) -> Path:
    """A copy of a run as it was when it had just committed the checkpoint of `step`, killed later."""
    shutil.copytree(source, target)
    for folder in (target / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return target
