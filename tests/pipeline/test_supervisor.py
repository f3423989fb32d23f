"""Ranks that die are started again together; what ends, ends everywhere. Ranks are stubs here; real ones:
tests/distributed/test_faults.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_prep.errors import UserError
from pipeline.startup import free_port
from pipeline.supervisor import supervise

ROOT = Path(__file__).parents[2]
SUPERVISOR = "import os, sys; from pipeline.supervisor import supervise; sys.exit(supervise(sys.argv[2:], int(sys.argv[1]), os.environ))"  # noqa: E501
STUB = """
import json, os, signal, sys, time
folder, plan = sys.argv[1], json.loads(sys.argv[2])
rank = os.environ["RANK"]
path = os.path.join(folder, f"starts_{rank}")
with open(path, "a") as file:
    file.write(json.dumps([os.environ["MASTER_PORT"], sys.argv[3:], os.getpid()]) + chr(10))
generation = len(open(path).readlines()) - 1
what = plan[min(generation, len(plan) - 1)].get(rank, "wait")
if what == "wait":
    time.sleep(600)
elif what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(what)
"""


@pytest.fixture
def world(tmp_path):
    """world(plan, restarts, ...) -> the supervisors of three ranks, whose stubs do what the plan says of their
    generation."""
    started = []

    def start(plan, restarts):
        (tmp_path / "stub.py").write_text(STUB)
        port = str(free_port())
        for rank in range(3):
            environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
            command = [sys.executable, "-c", SUPERVISOR, str(restarts), sys.executable, str(tmp_path / "stub.py")]
            started.append(
                subprocess.Popen(
                    [*command, str(tmp_path), json.dumps(plan)], cwd=ROOT, env={**environment, "MASTER_PORT": port}
                )
            )
        return started

    yield start
    for process in started:
        process.kill()


def starts(folder, rank):
    path = folder / f"starts_{rank}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def statuses(supervisors):
    return [supervisor.wait(timeout=120) for supervisor in supervisors]


def nothing_runs(folder):
    return not any(psutil.pid_exists(pid) for rank in range(3) for _, _, pid in starts(folder, rank))


def test_a_killed_rank_has_all_start_again_from_the_newest_checkpoint(world, tmp_path):
    assert statuses(world([{"1": "kill"}, {"2": 124}, {"0": 0, "1": 0, "2": 0}], 2)) == [0, 0, 0]
    generations = [starts(tmp_path, rank) for rank in range(3)]
    assert [len(one) for one in generations] == [3, 3, 3]
    for ports in zip(*([port for port, _, _ in one] for one in generations), strict=True):
        assert len(set(ports)) == 1, "one generation meets at one port"
    assert [further for _, further, _ in generations[0]] == [[], ["--resume", "auto"], ["--resume", "auto"]]
    assert nothing_runs(tmp_path)


def test_after_so_many_restarts_the_status_is_the_ranks(world, tmp_path):
    assert statuses(world([{"1": "kill"}], 1)) == [137, 137, 137]
    assert len(starts(tmp_path, 0)) == 2 and nothing_runs(tmp_path)


@pytest.mark.parametrize("status", [1, 75, 130])
def test_a_mistake_or_a_wish_is_no_reason_to_start_again(world, tmp_path, status):
    rest = {} if status == 1 else {"1": status, "2": status}
    assert statuses(world([{"0": status, **rest}], 5)) == [status] * 3
    assert len(starts(tmp_path, 0)) == 1 and nothing_runs(tmp_path)


def test_a_crash_is_taken_for_that_of_the_rank_that_was_killed(world, tmp_path):
    assert statuses(world([{"0": 70, "1": "kill", "2": 70}, {"0": 0, "1": 0, "2": 0}], 1)) == [0, 0, 0]


def test_a_lost_supervisor_ends_all_others_and_their_ranks(world, tmp_path):
    supervisors = world([{}], 5)
    while not all(starts(tmp_path, rank) for rank in range(3)):
        time.sleep(0.05)
    supervisors[2].send_signal(signal.SIGKILL)
    assert statuses(supervisors[:2]) == [70, 70]
    assert not any(psutil.pid_exists(starts(tmp_path, rank)[0][2]) for rank in (0, 1))
    os.kill(starts(tmp_path, 2)[0][2], signal.SIGKILL)  # a real rank sees that its parent has gone


def test_torchruns_own_restarts_are_pointed_to_and_a_taken_port_is_named():
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(UserError, match=r"torchrun.*--max-restarts"):
        supervise([], 1, {**environment, "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none"})
    with socket.create_server(("", 0)) as taken, pytest.raises(UserError, match=r"MASTER_PORT .* is taken"):
        supervise([], 1, {**environment, "MASTER_PORT": str(taken.getsockname()[1])})
