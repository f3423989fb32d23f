"""How a run is told to end: signals by phase, files in its folder, a launcher that has gone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import interruption
from pipeline.interruption import SUPERVISED, Interruption, Requests, launcher_is_gone
from pipeline.startup import hold

ROOT = Path(__file__).parents[2]


@pytest.fixture
def handlers():
    """Signal handlers as they were."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_before_the_first_step_every_signal_ends_the_start(handlers, number):
    interrupted = Interruption()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt):  # also where Python had to drop the first
        interrupted.check()


def test_later_the_launchers_signals_are_wishes_and_ctrl_c_is_not(handlers, tmp_path):
    interrupted = Interruption()
    assert not interrupted.ask("too early")
    interrupted.finish_steps()
    requests = Requests(tmp_path, interrupted, is_first=False)
    assert requests.mine() == (False, False)
    os.kill(os.getpid(), signal.SIGTERM)
    interrupted.check()
    assert requests.mine() == (False, True) and requests.reason() == "SIGTERM"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_files_are_seen_by_the_first_rank_once_and_what_was_left_by_another_run_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    (tmp_path / "stop").touch()
    requests = Requests(tmp_path, Interruption(), is_first=True)
    assert requests.mine() == (False, False) and not (tmp_path / "stop").exists()
    (tmp_path / "save").touch()
    assert Requests(tmp_path / "other", Interruption(), is_first=False).mine() == (False, False)
    assert requests.mine() == (True, False)
    requests.done()
    assert requests.mine() == (False, False) and not (tmp_path / "save").exists()


def test_a_shell_that_goes_takes_no_run_with_it(monkeypatch):
    monkeypatch.delenv(SUPERVISED, raising=False)
    assert launcher_is_gone() is False  # at once: the parent is no launcher


RANK = """
import time
from pipeline import interruption
plain = time.sleep
def told(seconds):
    print("watching", flush=True)
    plain(seconds)
time.sleep = told
print("gone", interruption.launcher_is_gone(), flush=True)
"""
LAUNCH = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(600)"


@pytest.mark.parametrize("name", ["torchrun", "deepspeed.launcher.launch"])
def test_a_killed_launcher_is_noticed(name):
    command = [sys.executable, "-c", LAUNCH, RANK, name]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None and launcher.stdout.readline() == "watching\n"
    launcher.kill()
    launcher.wait()
    assert launcher.stdout.read().splitlines()[-1] == "gone True"


def test_the_lock_of_a_folder_names_its_holder_and_goes_with_it(tmp_path):
    from data_prep.errors import UserError

    with hold(tmp_path), pytest.raises(UserError, match=rf"process {os.getpid()} on .* is at work there"):
        hold(tmp_path)
    code = "import sys, time; from pathlib import Path; from pipeline.startup import hold\n"
    code += "kept = hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on"):
        hold(tmp_path)
    holder.kill()
    holder.wait()
    hold(tmp_path).close()
