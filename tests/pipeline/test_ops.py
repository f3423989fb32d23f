"""C++ ops are compiled once a host, in view, and a start that was killed harms no later one.

The op here is two lines of C++; a stand-in for the compiler counts its calls and can be held up.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep.errors import UserError
from pipeline import ops

ROOT = Path(__file__).parents[2]

BUILD_TINY_OP = """
import sys
from pathlib import Path
from pipeline.ops import build_op, configure_environment, extensions_folder

configure_environment()

def load():
    from torch.utils.cpp_extension import load
    load(name="tiny_op", sources=[sys.argv[1]], is_python_module=False)

build_op("tiny_op", extensions_folder(), load, lambda line: print(line, flush=True))
"""

LOAD_WITH_TORCH_ALONE = """
import sys
from torch.utils.cpp_extension import load
load(name="tiny_op", sources=[sys.argv[1]], is_python_module=False)
"""


class Workshop:
    """A source, a folder for its compiled form, and a compiler that waits while `held_up` exists."""

    def __init__(self, folder: Path) -> None:
        self.extensions = folder / "extensions"
        self.build_folder = self.extensions / "tiny_op"
        self.source = folder / "tiny_op.cpp"
        self.source.write_text('extern "C" int seven() { return 7; }\n')
        self.held_up = folder / "held_up"
        self.compilations = folder / "compilations"
        compiler = folder / "compiler"
        compiler.write_text(
            textwrap.dedent(f"""\
                #!/bin/sh
                case "$*" in *" -c "*)
                    echo once >> {self.compilations}
                    while [ -e {self.held_up} ]; do sleep 0.05; done
                esac
                exec g++ "$@"
                """)
        )
        compiler.chmod(0o755)
        self.environment = os.environ | {
            "TORCH_EXTENSIONS_DIR": str(self.extensions),
            "CXX": str(compiler),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.started: list[subprocess.Popen[str]] = []

    def start(self, program: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(self.source)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def start_and_hold_up(self) -> subprocess.Popen[str]:
        """torch alone, in the middle of a build that does not end."""
        self.held_up.touch()
        process = self.start(LOAD_WITH_TORCH_ALONE)
        wait_until(self.compilations.exists)
        assert (self.build_folder / "lock").exists()
        return process

    def number_of_compilations(self) -> int:
        return len(self.compilations.read_text().splitlines())


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def kill_session(leader: int) -> None:
    """Kills the leader of a session and all that it started (ninja makes process groups of its own)."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(int(process.name)) == leader:
                    os.kill(int(process.name), signal.SIGKILL)


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return [line for line in output.splitlines() if "tiny_op" in line or "process" in line]


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed, and nothing but offload needs it")
    workshop = Workshop(tmp_path)
    yield workshop
    workshop.held_up.unlink(missing_ok=True)
    for process in workshop.started:
        kill_session(process.pid)
        process.communicate()


def test_a_build_says_so_and_a_cached_op_loads_in_silence(workshop: Workshop) -> None:
    first = lines_of(workshop.start(BUILD_TINY_OP))
    assert first[0] == "building tiny_op (C++, once for this environment) ..."
    assert first[1].startswith("built tiny_op in ") and first[1].endswith(" s")
    assert len(first) == 2
    assert lines_of(workshop.start(BUILD_TINY_OP)) == []
    assert workshop.number_of_compilations() == 1


def test_a_build_killed_halfway_is_cleared_away_and_done_again(workshop: Workshop) -> None:
    killed = workshop.start_and_hold_up()
    kill_session(killed.pid)
    killed.wait()
    workshop.held_up.unlink()
    lines = lines_of(workshop.start(BUILD_TINY_OP))
    assert lines[0] == f"removed {workshop.build_folder / 'lock'}, left by a build that was killed"
    assert lines[1].startswith("building tiny_op")
    assert lines[2].startswith("built tiny_op")


def test_a_compiler_that_outlives_its_killed_parent_is_waited_for(workshop: Workshop) -> None:
    killed = workshop.start_and_hold_up()
    killed.kill()  # The parent alone: ninja and the compiler go on.
    killed.wait()
    waiting = workshop.start(BUILD_TINY_OP)
    assert waiting.stdout is not None
    line = waiting.stdout.readline()
    assert line.startswith("waiting for process ") and str(workshop.build_folder) in line
    workshop.held_up.unlink()
    assert lines_of(waiting)[-1].startswith("built tiny_op")


def test_a_foreign_build_in_progress_is_named_and_waited_for(workshop: Workshop) -> None:
    foreign = workshop.start_and_hold_up()
    waiting = workshop.start(BUILD_TINY_OP)
    assert waiting.stdout is not None
    line = waiting.stdout.readline()
    assert line.startswith("waiting for process ")
    named = int(line.split()[3])
    assert os.getsid(named) == foreign.pid
    workshop.held_up.unlink()
    assert lines_of(waiting) == []
    assert foreign.wait() == 0
    assert workshop.number_of_compilations() == 1


def test_of_two_starts_at_once_one_builds_and_the_other_waits_and_says_so(workshop: Workshop) -> None:
    workshop.held_up.touch()
    both = [workshop.start(BUILD_TINY_OP) for _ in range(2)]
    first_lines = []
    for process in both:
        assert process.stdout is not None
        first_lines.append(process.stdout.readline())
    workshop.held_up.unlink()
    assert sorted(line.split()[0] for line in first_lines) == ["building", "waiting"]
    waiting = next(line for line in first_lines if line.startswith("waiting"))
    builder = both[0 if first_lines[0].startswith("building") else 1]
    assert waiting.startswith(f"waiting for process {builder.pid} on ")
    assert waiting.endswith(" to build tiny_op ...\n")
    for process in both:
        lines_of(process)
    assert workshop.number_of_compilations() == 1


@pytest.mark.parametrize(
    ("source", "path", "reason"),
    [
        ("#include <Python-not-there.h>\n", None, "Python-not-there.h: No such file or directory"),
        ("int f() { return 1; }\n", "empty", "Ninja is required"),
    ],
)
def test_a_failed_build_is_one_line_with_the_reason_and_what_to_install(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, source: str, path: str | None, reason: str
) -> None:
    workshop.source.write_text(source)
    for name, value in workshop.environment.items():
        monkeypatch.setenv(name, value)
    if path:
        monkeypatch.setenv("PATH", path)

    def load() -> None:
        from torch.utils import cpp_extension

        cpp_extension.verify_ninja_availability()
        cpp_extension.load(name="tiny_op", sources=[str(workshop.source)], is_python_module=False)

    with pytest.raises(UserError) as caught:
        ops.build_op("tiny_op", workshop.extensions, load, lambda line: None)
    message = str(caught.value)
    assert message.startswith(f"cannot build tiny_op in {workshop.build_folder}: ")
    assert reason in message
    assert "apt install g++ python3-dev ninja-build" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("zero_optimization", "names"),
    [
        ({"stage": 0}, []),
        ({"stage": 2}, []),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, []),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, []),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, ["cpu_adam"]),
        ({"stage": 2, "cpu_offload": True}, ["cpu_adam"]),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, ["pin_memory", "async_io"]),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, ["cpu_adam", "pin_memory", "async_io"]),
    ],
)
def test_only_offload_requires_an_op(zero_optimization: dict[str, object], names: list[str]) -> None:
    assert ops.required_ops({"zero_optimization": zero_optimization}, "cpu") == names


def test_gpu_direct_storage_is_an_op_of_its_own() -> None:
    zero = {"stage": 3, "offload_param": {"device": "nvme"}}
    config = {"zero_optimization": zero, "aio": {"use_gds": True}}
    assert ops.required_ops(config, "cuda") == ["pin_memory", "async_io", "gds"]


def test_ops_live_in_the_environment_or_else_in_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    inside = ops.extensions_folder()
    assert inside.parent == tmp_path / "environment" / "var" / "torch_extensions"
    monkeypatch.setattr(sys, "prefix", "/proc/self")  # Not writable, whoever we are.
    outside = ops.extensions_folder()
    assert outside.parent == tmp_path / "cache" / "torch_extensions"
    assert outside.name.startswith(inside.name)


def test_the_users_own_choice_of_folder_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/somewhere/of/mine")
    monkeypatch.setenv("PATH", "/bin")
    ops.configure_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/somewhere/of/mine"
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/bin"


TRAIN_TWO_STEPS = """
import torch
from pipeline.ops import skip_unused_ops
from pipeline.startup import leave

skip_unused_ops()
import deepspeed

deepspeed.init_distributed(dist_backend="gloo")
for stage in (2, 3):
    model = torch.nn.Linear(8, 8)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 8)).square().mean())
        engine.step()
    if deepspeed.comm.get_rank() == 0:
        print(f"trained at stage {stage}", flush=True)
deepspeed.comm.barrier()
leave(0)
"""


def test_cpu_ranks_train_at_zero_2_and_3_without_a_compiler_and_build_nothing(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PATH": str(tmp_path / "no_programs"),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN_TWO_STEPS],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    assert "trained at stage 2" in outputs[0] and "trained at stage 3" in outputs[0]
    assert not (tmp_path / "extensions").exists()
