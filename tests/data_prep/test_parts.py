"""Parts run in worker processes: in order, kept when done, done again when their input has changed, ended cleanly."""

import fcntl
import os
import signal
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.parts import (
    PARTS_FOLDER,
    _signals_held_back,
    available_cores,
    finish_parts,
    megabytes,
    positive_integer,
    run_parts,
)


def run(output_dir: Path, function, parts, inputs=None, job=None, workers=2):
    return run_parts(
        function,
        parts,
        part_inputs=inputs or [[] for _ in parts],
        part_bytes=[1] * len(parts),
        output_dir=output_dir,
        job=job or {"command": "test"},
        workers=workers,
        description="test",
    )


@pytest.fixture
def importable(tmp_path_factory, monkeypatch):
    """A module that worker processes can import."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "part_functions.py").write_text(
        "import os, signal\n"
        "from pathlib import Path\n"
        "def double(number, folder, report):\n"
        "    with open(Path(folder) / f'calls-{number}', 'a') as file: file.write('x')\n"
        "    report(1, 1)\n"
        "    return {'value': 2 * number}\n"
        "def fail(number, folder, report):\n"
        "    if number == 1: raise OSError(28, 'No space left on device', 'the/file')\n"
        "    return {}\n"
        "def die(number, folder, report):\n"
        "    (Path(folder) / f'a.bin.{os.getpid()}.partial').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "def touch(number, folder, report):\n"
        "    Path(number).write_text('other content')\n"
        "    return {}\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    import part_functions

    return part_functions


def test_results_are_in_the_order_of_the_parts(tmp_path, importable):
    calls = [(number, str(tmp_path)) for number in range(7)]
    assert run(tmp_path, importable.double, calls) == [{"value": 2 * number} for number in range(7)]


def test_no_parts_give_no_results(tmp_path):
    assert run(tmp_path, max, []) == []


def test_a_done_part_is_kept_unless_its_input_has_changed(tmp_path, importable):
    inputs = [tmp_path / name for name in ("in-0", "in-1")]
    for path in inputs:
        path.write_text("before")
    calls = [(number, str(tmp_path)) for number in range(2)]
    names = [[str(path)] for path in inputs]
    run(tmp_path, importable.double, calls, names)
    inputs[1].write_text("after, longer")
    assert run(tmp_path, importable.double, calls, names) == [{"value": 0}, {"value": 2}]
    assert (tmp_path / "calls-0").read_text() == "x"
    assert (tmp_path / "calls-1").read_text() == "xx"
    finish_parts(tmp_path)
    assert not (tmp_path / PARTS_FOLDER).exists()


def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path, importable):
    path = tmp_path / "input"
    path.write_text("before")
    with pytest.raises(UserError, match="input changed while it was read"):
        run(tmp_path, importable.touch, [(str(path), "")], [[str(path)]])


def test_unfinished_work_of_another_job_is_refused(tmp_path, importable):
    run(tmp_path, importable.double, [(1, str(tmp_path))], job={"command": "test", "seed": 1})
    with pytest.raises(UserError, match="unfinished work of another job"):
        run(tmp_path, importable.double, [(1, str(tmp_path))], job={"command": "test", "seed": 2})


def test_two_processes_do_not_work_in_one_folder(tmp_path, importable):
    (tmp_path / PARTS_FOLDER).mkdir()
    with open(tmp_path / PARTS_FOLDER / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is at work"):
            run(tmp_path, importable.double, [(1, str(tmp_path))])


def test_an_error_of_a_worker_keeps_its_file_name(tmp_path, importable):
    with pytest.raises(OSError, match="No space left on device: 'the/file'"):
        run(tmp_path, importable.fail, [(0, ""), (1, "")])


def test_a_killed_worker_is_explained_and_leaves_no_temporary_file(tmp_path, importable):
    (tmp_path / "old.bin.1.partial").write_text("of an earlier killed run")
    with pytest.raises(UserError, match=r"a worker process was killed \(out of memory\?\)"):
        run(tmp_path, importable.die, [(0, str(tmp_path))])
    assert [path.name for path in tmp_path.iterdir()] == [PARTS_FOLDER]


def test_ctrl_c_is_answered_after_the_workers_have_started(tmp_path, importable):
    """The signal is held back only while they start."""
    handler = signal.getsignal(signal.SIGINT)
    run(tmp_path, importable.double, [(1, str(tmp_path))])
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_signal_that_is_held_back_is_not_lost():
    with pytest.raises(KeyboardInterrupt), _signals_held_back():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached


def test_available_cores_are_those_of_this_process():
    assert available_cores() == len(os.sched_getaffinity(0)) >= 1


def test_flag_values_are_checked_with_their_units():
    assert (positive_integer("3"), megabytes("0.5"), megabytes("1e-6")) == (3, 500_000, 1)
    for parse, bad in [(positive_integer, ["0", "-1", "1.5", "x", ""]), (megabytes, ["0", "-1", "nan", "inf", "x"])]:
        for text in bad:
            with pytest.raises(Exception, match="expected a"):
                parse(text)
