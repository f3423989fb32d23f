"""A job's parts: what is to be done, what is done already, and how the job ends.

A stage is one job in one `--output_dir`; a job has phases, a phase has parts that do not depend on one another. A
part's result is a small dict that is kept, durably, in `<output_dir>/.parts/<phase>/` as soon as the part is done. A
job that was killed continues with the parts that are missing or whose input has changed since. The result does not
depend on who did which part: `executors` has worker processes, tasks of an array, and Ray.
"""

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_prep import durable, files
from data_prep.documents import REJECTED_NAME
from data_prep.errors import UserError
from data_prep.executors import (
    STALE_SECONDS,
    Claims,
    JobVanishedError,
    PartTask,
    Phase,
    Share,
    run_in_processes,
    run_on_ray,
)
from data_prep.files import InputFile
from data_prep.manifest import MANIFEST_NAME, describe_inputs, is_current, read_json
from data_prep.progress import Report as Report
from data_prep.progress import progress_bar as progress_bar
from data_prep.rejections import Tolerance

PARTS_FOLDER = ".parts"
EXECUTORS = ("local", "array", "ray")
_JOB_NAME = "job.json"
_LOCK_NAME = "lock"
_SCRATCH = "scratch"
_FINISH_NAME = "claim-finish"
_WAIT_SECONDS = 0.2
_REMOTE_THREADS = 16


def available_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def positive_integer(text: str) -> int:
    """The type of command-line flags such as --workers."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def megabytes(text: str) -> int:
    """The type of command-line flags in MB; returns bytes."""
    try:
        size = int(float(text) * 1e6)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number of megabytes")
    return size


def fraction(text: str) -> float:
    """The type of command-line flags from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to 1")
    return value


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Execution`."""
    group = parser.add_argument_group("who does the work, and how much bad input it bears")
    group.add_argument(
        "--workers",
        type=positive_integer,
        metavar="N",
        default=available_cores(),
        help="worker processes, of each array task (default: the cores, %(default)s here)",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run of this stage left in --output_dir"
    )
    group.add_argument(
        "--max_bad_fraction",
        type=fraction,
        metavar="F",
        default="0.001",
        help="part of the documents that may be unreadable before the job stops, 0 to 1 (default: %(default)s)",
    )
    group.add_argument(
        "--executor",
        choices=EXECUTORS,
        help="local: processes of this machine; array: one of --num_tasks tasks that share a file system;"
        " ray: an existing Ray cluster (default: local, or array with --task_index)",
    )
    group.add_argument(
        "--task_index", type=int, metavar="I", help="array: number of this task, from 0 (such as $SLURM_ARRAY_TASK_ID)"
    )
    group.add_argument("--num_tasks", type=positive_integer, metavar="N", help="array: how many tasks there are")
    group.add_argument(
        "--ray_address", metavar="A", default="auto", help="ray: address of the cluster (default: %(default)s)"
    )


@dataclass(frozen=True)
class Execution:
    """Who does the parts of a job: the flags of `add_work_arguments`, which say what each means."""

    workers: int = 1
    overwrite: bool = False
    max_bad_fraction: float = 0.001
    executor: str = "local"
    task_index: int = 0
    num_tasks: int = 1
    ray_address: str = "auto"

    def __post_init__(self) -> None:
        """Raises UserError for options that do not go together."""
        if not 0 <= self.task_index < self.num_tasks:
            raise UserError(
                f"--task_index {self.task_index} --num_tasks {self.num_tasks}: expected an index from 0 to"
                f" {self.num_tasks - 1}"
            )
        if self.executor == "array" and self.overwrite:
            raise UserError(
                "--overwrite does not go with --task_index: a task would discard what the others have done;"
                " remove --output_dir before the array starts"
            )

    @staticmethod
    def of(arguments: argparse.Namespace) -> "Execution":
        """From parsed flags; raises UserError for flags that do not go together."""
        of_array = (arguments.task_index is not None, arguments.num_tasks is not None)
        executor = arguments.executor or ("array" if any(of_array) else "local")
        if executor == "array" and not all(of_array):
            raise UserError("an array task needs both --task_index and --num_tasks")
        if executor != "array" and any(of_array):
            raise UserError(f"--task_index and --num_tasks do not go with --executor {executor}")
        return Execution(
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            max_bad_fraction=arguments.max_bad_fraction,
            executor=executor,
            task_index=arguments.task_index or 0,
            num_tasks=arguments.num_tasks or 1,
            ray_address=arguments.ray_address,
        )


class Work:
    """A job at work in `output_dir`; made by `working`.

    job: what the manifest is to hold: the command, its options and, under "inputs", what was read.
    """

    def __init__(
        self, output_dir: Path, job: dict[str, Any], inputs: Sequence[InputFile], execution: Execution, claims: Claims
    ) -> None:
        self.output_dir = output_dir
        self.job = {**job, "inputs": describe_inputs(inputs)}
        self._plain_job, self._inputs = job, inputs
        self._execution, self._claims = execution, claims
        self._records = output_dir / PARTS_FOLDER
        self._phases: list[str] = []
        self._so_far = ""
        self._finisher: bool | None = None

    @property
    def scratch(self) -> Path:
        """A folder for intermediate files, removed when the job is finished."""
        folder = self._records / _SCRATCH
        folder.mkdir(exist_ok=True)
        return folder

    def run(
        self,
        function: Callable[..., dict[str, Any]],
        parts: Sequence[tuple[Any, ...]],
        *,
        part_inputs: Sequence[Sequence[str]],
        part_bytes: Sequence[int],
        description: str,
    ) -> list[dict[str, Any]]:
        """Calls `function(*part, report)` for every part, wherever; returns all results in the order of the parts.

        function: importable by name; writes its files so that they are whole under their final names, the same bytes
            whenever it is called, and returns a small JSON-able dict.
        parts: arguments, whose repr identifies them.
        description: names the phase on the bar; one job's phases have different ones.
        part_inputs: the files each part reads, local or remote; a part is done again when one has changed, or when
            any part of the phases before is another.
        part_bytes: bytes of input of each part.
        A result may hold "read": {"documents": ...} and "rejected": [...] (`DocumentStream.summary`): the job stops
        with UserError when more than `max_bad_fraction` of the documents are rejected.

        Raises UserError for a part that met bad input, a worker that was killed, or inputs that change while they
        are read; OSError with a file's name.
        """
        name = re.sub(r"\W+", "_", description.lower())
        if name in (*self._phases, _SCRATCH):
            raise ValueError(f"a phase of this job is called {description!r} already")
        self._phases.append(name)
        records = self._records / name
        with contextlib.suppress(FileExistsError):
            self._make_folder(records)
        versions = self._versions(part_inputs)
        tasks = [
            PartTask(
                index=index,
                function=function,
                arguments=arguments,
                identity=self._identity(function, arguments, [versions[file] for file in inputs]),
                record=records / f"{index:06d}.json",
                inputs=tuple(inputs),
                bytes=size,
            )
            for index, (arguments, inputs, size) in enumerate(zip(parts, part_inputs, part_bytes, strict=True))
        ]
        self._so_far = _sha256_of([self._so_far, *(task.identity for task in tasks)])
        tolerance = Tolerance(self._execution.max_bad_fraction, description, sum(part_bytes), self.output_dir)
        phase = Phase(tasks, description, records, tolerance)
        phase.find_records()
        if phase.results:
            print(
                f"{description}: {len(phase.results)} of {len(tasks)} parts were done before and are kept", flush=True
            )
        self._execute(phase, name)
        for file, version in self._versions(part_inputs).items():
            if version != versions[file]:
                raise UserError(f"{description}: {file} changed while it was read; run the same command again")
        return phase.finish()

    def _execute(self, phase: Phase, name: str) -> None:
        execution = self._execution
        if execution.executor == "ray":
            run_on_ray(phase, execution.ray_address)
        elif execution.executor == "array":
            share = Share(self._claims, self._records / f"claims-{name}", execution.task_index, execution.num_tasks)
            with contextlib.suppress(FileExistsError):
                self._make_folder(share.folder)
            run_in_processes(phase, execution.workers, self.output_dir, share)
        else:
            run_in_processes(phase, execution.workers, self.output_dir)

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir()
        except FileNotFoundError:
            raise JobVanishedError(f"{folder.parent} is gone") from None

    def _identity(self, function: Callable[..., Any], arguments: tuple[Any, ...], versions: Sequence[Any]) -> str:
        """Equal for the same part of the same input, whoever does it.

        A part depends on all the phases before its own; so what those wrote needs no time stamps, which differ when
        two tasks write the same file.
        """
        return _sha256_of([function.__module__, function.__qualname__, arguments, versions, self._so_far])

    def _versions(self, part_inputs: Sequence[Sequence[str]]) -> dict[str, Any]:
        """What is different of each file when it has changed; raises OSError."""
        names = list(dict.fromkeys(itertools.chain.from_iterable(part_inputs)))
        own = self.output_dir.resolve()

        def version(name: str) -> Any:
            if files.is_remote(name) or files.is_dataset(name):
                return files.state(name)
            return os.stat(name).st_size if _resolved(name).is_relative_to(own) else files.state(name)

        if not any(map(files.is_remote, names)):
            return {name: version(name) for name in names}
        with ThreadPoolExecutor(_REMOTE_THREADS) as threads:
            return dict(zip(names, threads.map(version, names), strict=True))

    def finishes(self) -> bool:
        """True in the one process that writes what the whole job leaves, its manifest last.

        To be asked when all phases are done. The other array tasks get False, once the manifest is there.
        """
        self._finisher = self._execution.executor != "array" or self._claim_the_end()
        if self._finisher:
            (self.output_dir / REJECTED_NAME).unlink(missing_ok=True)  # of a run that had too many
        return self._finisher

    def _claim_the_end(self) -> bool:
        claim = self._records / _FINISH_NAME
        said = False
        while not is_current(self.output_dir, self._plain_job, self._inputs):
            if self._claims.take_over(claim):
                if not is_current(self.output_dir, self._plain_job, self._inputs):
                    return True
                self._claims.release(claim)
                break
            if not said:
                print(
                    f"{self.output_dir}: all parts are done; waiting for the task that writes the manifest"
                    f" (taken over when it is silent for {STALE_SECONDS:.0f} s)",
                    flush=True,
                )
                said = True
            time.sleep(_WAIT_SECONDS)
        return False

    def end(self) -> None:
        """Called by `working` after the block."""
        if self._finisher if self._finisher is not None else self.finishes():
            durable.remove_temporary_files(self.output_dir, alone=self._execution.executor != "array")
            _forget_parts(self.output_dir)

    @property
    def ended_elsewhere(self) -> bool:
        """True when another array task has finished the job, whatever this one met meanwhile."""
        return (
            self._execution.executor == "array"
            and not self._finisher
            and is_current(self.output_dir, self._plain_job, self._inputs)
        )


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _resolved(name: str) -> Path:
    path = Path(name)
    return path.parent.resolve() / path.name  # an input that is a link counts where the link is


@contextlib.contextmanager
def working(
    output_dir: Path, job: dict[str, Any], inputs: Sequence[InputFile], execution: Execution
) -> Iterator[Work | None]:
    """The work of `job` in `output_dir`, or None when it is done there already (one line says so).

    job: command and options, without the inputs' state; an unfinished or finished result of another job is refused.
    When the block ends well the manifest has been written, and what the parts left behind is removed. An array task
    that others have outrun leaves the block early and without an error: what follows the block must do with what the
    manifest says.

    `--overwrite` discards what an earlier run of the same command left there, and nothing else. Raises UserError when
    the folder holds something else, holds one of the inputs, or is being worked on in a way that excludes this one.
    """
    _refuse_foreign_folder(output_dir, job, inputs, overwrite=execution.overwrite)
    if not execution.overwrite and _is_done(output_dir, job, inputs):
        yield None
        return
    (output_dir / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
    array = execution.executor == "array"
    with _locked(output_dir, shared=array), Claims() as claims:
        if execution.overwrite:
            _discard(output_dir)
        if is_current(output_dir, job, inputs):  # finished since we looked
            yield None
            return
        _claim_job(output_dir, job)
        durable.remove_temporary_files(output_dir, alone=not array)  # of a run that was killed
        work = Work(output_dir, job, inputs, execution, claims)
        try:
            yield work
            work.end()
        except Exception as error:
            if work.ended_elsewhere:
                if not (output_dir / PARTS_FOLDER / _JOB_NAME).exists():
                    _forget_parts(output_dir)  # what this task wrote there after the others had removed all
                print(f"{output_dir}: finished by another task", flush=True)
            elif isinstance(error, JobVanishedError):
                raise UserError(
                    f"{output_dir}: the records of the unfinished job were removed ({error}); run the command again"
                ) from None
            else:
                raise


def _refuse_foreign_folder(
    output_dir: Path, job: dict[str, Any], inputs: Sequence[InputFile], *, overwrite: bool
) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file, expected a folder")
    own = output_dir.resolve()
    within = [file.name for file in inputs if _is_local(file.name) and Path(file.name).resolve().is_relative_to(own)]
    if within:
        raise UserError(f"--output_dir {output_dir} holds the input {within[0]}; give another --output_dir")
    if not output_dir.exists() or all(path.name == PARTS_FOLDER for path in output_dir.iterdir()):
        command = _command_of(output_dir) or job["command"]  # another task may just have made the folder
    else:
        command = _command_of(output_dir)
    if command != job["command"]:
        found = f"a result of {command!r}" if command else "nothing of ours"
        raise UserError(f"{output_dir} is not empty and holds {found}; give another --output_dir")
    if not overwrite and (output_dir / MANIFEST_NAME).exists() and not is_current(output_dir, job, inputs):
        raise UserError(
            f"{output_dir} holds the result of another job, or its inputs have changed since;"
            " give --overwrite to replace it, or another --output_dir"
        )


def _is_local(name: str) -> bool:
    return not files.is_remote(name) and not files.is_dataset(name)


def _is_done(output_dir: Path, job: dict[str, Any], inputs: Sequence[InputFile]) -> bool:
    """True, and a line, when the job is finished; what a run killed between its manifest and its end left goes."""
    if not is_current(output_dir, job, inputs):
        return False
    if (output_dir / PARTS_FOLDER).exists():
        with contextlib.suppress(UserError), _locked(output_dir, shared=False):  # not while another task ends
            _forget_parts(output_dir)
    print(f"{output_dir}: up to date", flush=True)
    return True


def _forget_parts(output_dir: Path) -> None:
    shutil.rmtree(output_dir / PARTS_FOLDER, ignore_errors=True)


def _discard(output_dir: Path) -> None:
    """Empties the folder, the manifest first, but for the lock that is held."""
    (output_dir / MANIFEST_NAME).unlink(missing_ok=True)
    kept = output_dir / PARTS_FOLDER / _LOCK_NAME
    for path in [*output_dir.iterdir(), *(output_dir / PARTS_FOLDER).iterdir()]:
        if path not in (kept, kept.parent):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _claim_job(output_dir: Path, job: dict[str, Any]) -> None:
    path = output_dir / PARTS_FOLDER / _JOB_NAME
    if not path.exists():
        durable.write_json(path, job)
    elif read_json(path) != json.loads(json.dumps(job)):
        raise UserError(
            f"{output_dir} holds the unfinished work of another job (other inputs or options);"
            " give --overwrite to discard it, or another --output_dir"
        )


def _command_of(output_dir: Path) -> str | None:
    """The command whose finished or unfinished work `output_dir` holds."""
    try:
        if (output_dir / MANIFEST_NAME).exists():
            return str(json.loads((output_dir / MANIFEST_NAME).read_bytes())["job"]["command"])
        return str(json.loads((output_dir / PARTS_FOLDER / _JOB_NAME).read_bytes())["command"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _locked(output_dir: Path, *, shared: bool) -> Iterator[None]:
    """One process at a time, or array tasks among themselves; the kernel frees the lock of one that was killed.

    Where the file system has no locks this is no protection, and none is needed for correct bytes.
    """
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(_open_lock(output_dir))
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{output_dir}: another process is at work there; wait for it or stop it") from None
            except OSError:
                break
            with contextlib.suppress(FileNotFoundError):  # a job that ended removed the file that we have locked
                if os.stat(file.name).st_ino == os.fstat(file.fileno()).st_ino:
                    break
        yield


def _open_lock(output_dir: Path) -> IO[str]:
    path = output_dir / PARTS_FOLDER / _LOCK_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "w")
