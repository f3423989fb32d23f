"""Whoever does the parts, the bytes are the same; whoever is killed, the next run goes on from there."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_prep import durable
from data_prep.errors import UserError
from data_prep.executors import Claims, JobVanishedError, Share, _signals_held_back
from data_prep.manifest import MANIFEST_NAME
from data_prep.parts import PARTS_FOLDER, Execution, working

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


@pytest.fixture
def functions(monkeypatch):
    """The module of part functions, as worker processes import it."""
    monkeypatch.syspath_prepend(str(HERE))
    import part_functions

    yield part_functions
    sys.modules.pop("part_functions")


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "notes").mkdir()
    for number in range(12):
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"content {number}\n" * (number + 1))
    return tmp_path / "in"


def array(index, number, *flags):
    return ["--task_index", index, "--num_tasks", number, "--workers", 1, *flags]


@pytest.fixture
def start(corpus, start_program):
    """Starts the job of two phases as a program of its own, in a process group of its own."""

    def start(output, *flags, slow=0.0, environment=None):
        environment = {**os.environ, "SLOW": str(slow), **(environment or {})}
        path = [environment.get("PYTHONPATH"), str(REPOSITORY), str(HERE)]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        return start_program(HERE / "part_functions.py", output, corpus, *flags, env=environment)

    return start


def outcome(process):
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def calls(corpus) -> dict[str, int]:
    """How often each part was begun."""
    paths = sorted((corpus.parent / "notes").glob("calls-*"))
    return {path.name[6:]: len(path.read_text().splitlines()) for path in paths}


def records(output) -> list[Path]:
    return sorted(output.glob(f"{PARTS_FOLDER}/*/0*.json"))


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def no_process_is_left(processes):
    return not any(process.is_running() and process.status() != "zombie" for process in processes)


@pytest.fixture
def expected(corpus, tmp_path, functions):
    """What one worker makes of the corpus."""
    functions.two_phases(sorted(corpus.iterdir()), tmp_path / "expected", tmp_path / "notes", Execution())
    shutil.rmtree(tmp_path / "notes")
    (tmp_path / "notes").mkdir()
    return contents(tmp_path / "expected")


# ------------------------------------------------------------------------------------------------------ processes


def test_more_workers_make_the_same_bytes(corpus, tmp_path, functions, expected):
    functions.two_phases(sorted(corpus.iterdir()), tmp_path / "out", tmp_path / "notes", Execution(workers=3))
    assert contents(tmp_path / "out") == expected
    assert set(calls(corpus).values()) == {1} and len(calls(corpus)) == 15


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_job_redoes_nothing_that_was_done(corpus, tmp_path, start, expected, signal_number):
    output = tmp_path / "out"
    process = start(output, "--workers", 2, slow=0.1)
    wait_for(lambda: len(records(output)) >= 3)
    family = psutil.Process(process.pid).children(recursive=True)
    if signal_number == signal.SIGINT:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        process.send_signal(signal_number)
    status, _, stderr = outcome(process)
    assert status == {signal.SIGKILL: -9, signal.SIGTERM: 130, signal.SIGINT: 130}[signal_number]
    assert "Traceback" not in stderr
    wait_for(lambda: no_process_is_left(family))
    if signal_number != signal.SIGKILL:
        assert not list(output.rglob(f"*{durable.TEMPORARY_SUFFIX}"))
    assert not (output / MANIFEST_NAME).exists()
    done = len(records(output))
    status, stdout, _ = outcome(start(output, "--workers", 2))
    assert status == 0 and f"{done} of 12 parts were done before" in stdout
    assert contents(output) == expected
    assert sum(calls(corpus).values()) <= 15 + 2  # at most the two that were at work are done twice


def run(output_dir, function, parts, **execution):
    with working(output_dir, {"command": "test"}, [], Execution(**execution)) as work:
        work.run(
            function,
            parts,
            part_inputs=[["the/input"] for _ in parts] if function.__name__ == "fail_to_read" else [[] for _ in parts],
            part_bytes=[1] * len(parts),
            description="test",
        )


def test_a_killed_worker_is_explained_and_leaves_no_temporary_file(tmp_path, functions):
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"a worker process was killed \(out of memory\?\)"):
        run(output, functions.die_once, [(number, str(tmp_path)) for number in range(5)])
    assert not list(output.rglob(f"*{durable.TEMPORARY_SUFFIX}"))
    done = len(records(output))
    with contextlib.suppress(FileNotFoundError):
        run(output, functions.die_once, [(number, str(tmp_path)) for number in range(5)])
    begun = [len((tmp_path / f"calls-{number}").read_text().splitlines()) for number in range(5)]
    assert done == 2 and begun == [1, 1, 2, 1, 1]


def test_an_error_of_a_worker_keeps_its_file_name(tmp_path, functions):
    with pytest.raises(OSError, match="No space left on device: 'the/file'"):
        run(tmp_path / "out", functions.fail, [(0, ""), (1, "")])


def test_a_full_disk_is_told_with_the_file_and_leaves_none(tmp_path, functions):
    """A limit of the size of files stands for it: it fails in write, where Python does not say which file."""
    with pytest.raises(OSError, match=r"File too large: '.*result'"):
        run(tmp_path / "out", functions.fill_up, [(0, str(tmp_path / "out" / "result"))])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PARTS_FOLDER]


def test_a_read_error_is_told_with_the_input_of_its_part(tmp_path, functions, monkeypatch):
    (tmp_path / "the").mkdir()
    (tmp_path / "the" / "input").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="Input/output error: 'part 0: the/input'"):
        run(tmp_path / "out", functions.fail_to_read, [(0, "")])


def test_a_worker_without_memory_says_so(tmp_path, functions):
    with pytest.raises(UserError, match="out of memory; run the same command again with fewer --workers"):
        run(tmp_path / "out", functions.run_out_of_memory, [(0, "")])


@pytest.mark.parametrize("flags", [["--workers", 2], array(0, 1)], ids=["local", "array"])
@pytest.mark.parametrize(
    ("operation", "number", "fault"),
    [("replace", 1, "kill"), ("replace", 8, "kill"), ("replace", 31, "kill"), ("fsync", 20, "28"), ("replace", 5, "5")],
)
def test_a_job_that_dies_at_an_operation_goes_on_from_it(
    corpus, tmp_path, functions, start, expected, operation, number, fault, flags
):
    """The 1st rename is the job's own record, the 31st that of the last part or of the manifest."""
    output = tmp_path / "out"
    sys.path.insert(0, str(HERE))
    try:
        from faults import faulty
    finally:
        sys.path.remove(str(HERE))
    (tmp_path / "faults").mkdir()
    status, _, stderr = outcome(
        start(output, *flags, environment=faulty(tmp_path / "faults", operation, number, fault))
    )
    assert status != 0
    assert "Traceback" not in stderr or fault != "kill", stderr
    assert not (output / MANIFEST_NAME).exists()
    for path in output.glob("result-*"):
        if path.suffix != durable.TEMPORARY_SUFFIX:
            assert path.read_bytes() == expected[path.name]
    status, _, stderr = outcome(start(output, *flags))
    assert status == 0, stderr
    assert contents(output) == expected
    assert sum(calls(corpus).values()) <= 15 + 4  # at most the two of each worker that were handed out


def test_two_local_runs_do_not_work_in_one_folder(corpus, tmp_path, start):
    first = start(tmp_path / "out", "--workers", 1, slow=0.2)
    wait_for(lambda: (tmp_path / "out" / PARTS_FOLDER / "job.json").exists())
    for flags in ([], ["--overwrite"], array(0, 2)):
        status, _, stderr = outcome(start(tmp_path / "out", *flags))
        assert (status, stderr) == (
            1,
            f"error: {tmp_path / 'out'}: another process is at work there; wait for it or stop it\n",
        )
    assert outcome(first)[0] == 0


def test_ctrl_c_is_answered_after_the_workers_have_started(tmp_path, functions):
    """The signal is held back only while they start."""
    handler = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(FileNotFoundError):
        run(tmp_path / "out", functions.double, [(1, str(tmp_path))])
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_signal_that_is_held_back_is_not_lost():
    with pytest.raises(KeyboardInterrupt), _signals_held_back():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached


# ---------------------------------------------------------------------------------------------------- array tasks


def test_tasks_side_by_side_make_the_bytes_of_one(corpus, tmp_path, start, expected):
    """Four that start at once, one of them twice."""
    tasks = [start(tmp_path / "out", *array(index, 4), slow=0.05) for index in (0, 1, 2, 3, 3)]
    for process in tasks:
        status, _, stderr = outcome(process)
        assert status == 0, stderr
    assert contents(tmp_path / "out") == expected
    assert set(calls(corpus).values()) == {1} and len(calls(corpus)) == 15


def test_tasks_one_after_another_make_the_bytes_of_one(corpus, tmp_path, start, expected):
    """A cluster with one free slot: the first task does it all, the others find it done."""
    outcomes = [outcome(start(tmp_path / "out", *array(index, 3))) for index in (2, 0, 1)]
    assert [status for status, _, _ in outcomes] == [0, 0, 0]
    assert outcomes[1][1] == outcomes[2][1] == f"{tmp_path / 'out'}: up to date\n"
    assert contents(tmp_path / "out") == expected


def test_what_a_killed_task_had_taken_on_is_taken_over(corpus, tmp_path, start, expected):
    output = tmp_path / "out"
    tasks = [start(output, *array(index, 2), slow=0.2) for index in range(2)]
    wait_for(lambda: len(records(output)) >= 3)
    family = psutil.Process(tasks[0].pid).children(recursive=True)
    tasks[0].kill()
    status, _, stderr = outcome(tasks[1])
    assert status == 0, stderr
    wait_for(lambda: no_process_is_left(family))
    assert contents(output) == expected
    assert sum(calls(corpus).values()) <= 15 + 1
    assert outcome(start(output, *array(0, 2)))[1] == f"{output}: up to date\n"


def test_all_tasks_killed_and_started_again_go_on(corpus, tmp_path, start, expected):
    output = tmp_path / "out"
    tasks = [start(output, *array(index, 2), slow=0.1) for index in range(2)]
    wait_for(lambda: len(records(output)) >= 4)
    for process in tasks:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert outcome(start(output, *array(1, 2)))[0] == 0
    assert contents(output) == expected
    assert sum(calls(corpus).values()) <= 15 + 2


def test_a_task_that_was_only_slow_does_no_harm(corpus, tmp_path, start, expected):
    """A task is stopped in the middle of a part; its claims are taken away; it wakes up when all is over."""
    output = tmp_path / "out"
    slow = start(output, *array(0, 2), slow=0.3)
    wait_for(lambda: records(output))
    stopped = [psutil.Process(slow.pid), *psutil.Process(slow.pid).children(recursive=True)]
    for process in stopped:
        process.suspend()
    for claim in output.glob(f"{PARTS_FOLDER}/claims-*/*"):
        claim.unlink()
    assert outcome(start(output, *array(1, 2)))[0] == 0
    assert contents(output) == expected
    for process in stopped:
        process.resume()
    status, stdout, stderr = outcome(slow)
    assert status == 0, stderr
    assert f"{output}: finished by another task" in stdout
    assert contents(output) == expected


def test_an_array_waits_for_no_local_run(corpus, tmp_path, start):
    task = start(tmp_path / "out", *array(0, 2), slow=0.2)
    wait_for(lambda: (tmp_path / "out" / PARTS_FOLDER / "job.json").exists())
    assert "another process is at work there" in outcome(start(tmp_path / "out"))[2]
    assert outcome(task)[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task_index", 1], "needs both --task_index and --num_tasks"),
        (["--executor", "array"], "needs both --task_index and --num_tasks"),
        (array(2, 2), "expected an index from 0 to 1"),
        (array(-1, 2), "expected an index from 0 to 1"),
        (array(0, 2, "--executor", "local"), "do not go with --executor local"),
        (array(0, 2, "--overwrite"), "--overwrite does not go with --task_index"),
    ],
)
def test_flags_that_do_not_go_together_are_one_error(tmp_path, functions, flags, message):
    import argparse

    from data_prep.parts import add_work_arguments

    parser = argparse.ArgumentParser()
    add_work_arguments(parser)
    with pytest.raises(UserError, match=message):
        Execution.of(parser.parse_args(list(map(str, flags))))


def test_a_share_begins_with_its_own_parts_and_goes_on_with_all_others(tmp_path):
    shares = [list(Share(Claims(), tmp_path, index, 3).order(8)) for index in range(3)]
    assert shares[1] == [1, 4, 7, 2, 5, 0, 3, 6]
    assert all(sorted(share) == list(range(8)) for share in shares)


def test_only_one_of_many_takes_a_claim(tmp_path):
    with Claims() as one, Claims() as other:
        assert one.take(tmp_path / "claim")
        assert not other.take(tmp_path / "claim")
        one.release(tmp_path / "claim")
        assert other.take(tmp_path / "claim")
    assert not (tmp_path / "claim").exists()


def test_a_claim_of_another_host_is_abandoned_when_nobody_touches_it(tmp_path):
    claim = tmp_path / "claim"
    claim.write_text("elsewhere 1 abc")
    with Claims(stale_seconds=0.2) as claims:
        for _ in range(3):
            assert not claims.take_over(claim)
            time.sleep(0.1)
            os.utime(claim)  # its owner is alive
        assert not claims.take_over(claim)
        wait_for(lambda: claims.take_over(claim), seconds=5)
        assert claims.holds(claim) and claim.read_text().startswith(durable.host_name())


def test_a_claim_of_a_dead_process_of_this_host_is_abandoned_at_once(tmp_path):
    claim = tmp_path / "claim"
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    claim.write_text(f"{durable.host_name()} {process.pid} abc")
    with Claims() as claims:
        assert claims.take_over(claim)


def test_a_claim_is_kept_alive(tmp_path):
    with Claims(heartbeat_seconds=0.01) as claims:
        claims.take(tmp_path / "claim")
        before = (tmp_path / "claim").stat().st_mtime_ns
        wait_for(lambda: (tmp_path / "claim").stat().st_mtime_ns > before)


def test_a_claim_in_a_folder_that_is_gone_tells_so(tmp_path):
    with Claims() as claims, pytest.raises(JobVanishedError):
        claims.take(tmp_path / "absent" / "claim")


def test_a_file_system_without_locks_is_worked_on_all_the_same(corpus, tmp_path, functions, expected, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    functions.two_phases(sorted(corpus.iterdir()), tmp_path / "out", tmp_path / "notes", Execution())
    assert contents(tmp_path / "out") == expected
