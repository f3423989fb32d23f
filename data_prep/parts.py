"""Runs one function over independent parts in worker processes: progress, resume, clean ends.

A part's result is a small dict that is kept, durably, in `<output_dir>/.parts/` as soon as the part is done. A job
that was killed continues with the parts that are missing or whose input files have changed since. The result does
not depend on the number of workers.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep import durable
from data_prep.errors import UserError
from data_prep.files import InputFile
from data_prep.manifest import MANIFEST_NAME, is_current, read_json

PARTS_FOLDER = ".parts"
_JOB_NAME = "job.json"
_LOCK_NAME = "lock"
_REPORT_SECONDS = 0.25

Report = Callable[[int, int], None]
"""Called by a part's function with (documents, bytes of input) done since its last call."""


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


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --workers and --overwrite."""
    parser.add_argument(
        "--workers",
        type=positive_integer,
        metavar="N",
        default=available_cores(),
        help="worker processes (default: the cores, %(default)s here)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run of this stage left in --output_dir"
    )


@dataclass(frozen=True)
class _Task:
    """What a worker process needs to do any part: pickled once a part, so it is kept small."""

    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    identity: str
    record: Path


_progress_queue: Any = None  # set in worker processes only, by _start_worker


def _start_worker(progress: Any) -> None:
    global _progress_queue
    _progress_queue = progress
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise wait for its next part for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do_part(task: _Task) -> dict[str, Any]:
    documents = size = 0
    last = time.monotonic()

    def report(more_documents: int, more_bytes: int) -> None:
        nonlocal documents, size, last
        documents, size = documents + more_documents, size + more_bytes
        now = time.monotonic()
        if now - last >= _REPORT_SECONDS:
            _progress_queue.put((documents, size))
            documents, size, last = 0, 0, now

    result = task.function(*task.arguments, report)
    _progress_queue.put((documents, size))
    durable.write_json(task.record, {"identity": task.identity, "result": result})
    return result


def _identity(arguments: tuple[Any, ...], inputs: Sequence[str]) -> str:
    """Equal for the same part of files that have not been touched."""
    states = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, inputs)]
    return hashlib.sha256(repr((arguments, states)).encode()).hexdigest()


def progress_bar(description: str, total_bytes: int | None) -> "tqdm[Any]":
    """A bar over bytes of input on stderr, with MB/s and ETA; quiet lines where stderr is not a terminal."""
    return tqdm(
        desc=description,
        total=total_bytes,
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        file=sys.stderr,
    )


def run_parts(
    function: Callable[..., dict[str, Any]],
    parts: Sequence[tuple[Any, ...]],
    *,
    part_inputs: Sequence[Sequence[str]],
    part_bytes: Sequence[int],
    output_dir: Path,
    job: dict[str, Any],
    workers: int,
    description: str,
) -> list[dict[str, Any]]:
    """Calls `function(*part, report)` for every part and returns the results in the order of the parts.

    function: importable by name; writes its files under `output_dir` so that they are whole under their final
        names, and returns a JSON-able dict.
    part_inputs: the files that each part reads; a part is done again when one of them has changed.
    part_bytes: bytes of input of each part, for the bar.
    job: identifies the work; unfinished work of another job in `output_dir` is refused.

    Raises UserError for a part that met bad input, a worker that was killed, a foreign unfinished job, or inputs that
    change while they are read.
    """
    records = output_dir / PARTS_FOLDER
    records.mkdir(parents=True, exist_ok=True)
    with _locked(records):
        _claim(records, job)
        tasks = [
            _Task(function, part, _identity(part, inputs), records / f"{index:06d}.json")
            for index, (part, inputs) in enumerate(zip(parts, part_inputs, strict=True))
        ]
        results = {index: kept for index, task in enumerate(tasks) if (kept := _kept_result(task)) is not None}
        missing = [index for index in range(len(tasks)) if index not in results]
        if results:
            print(f"{description}: {len(results)} of {len(tasks)} parts were done before and are kept")
        _remove_temporary_files(output_dir)  # of a run that was killed
        try:
            results |= _run_tasks(
                {index: tasks[index] for index in missing},
                sum(part_bytes[index] for index in missing),
                workers,
                description,
            )
        except BaseException:
            _remove_temporary_files(output_dir)
            raise
        for task, inputs in zip(tasks, part_inputs, strict=True):
            if _identity(task.arguments, inputs) != task.identity:
                raise UserError(
                    f"{description}: {' or '.join(inputs[:2])} changed while it was read; run the same command again"
                )
        return [results[index] for index in range(len(tasks))]


def _run_tasks(tasks: dict[int, _Task], total_bytes: int, workers: int, description: str) -> dict[int, dict[str, Any]]:
    """Runs every task in worker processes, which have ended when this returns or raises."""
    results: dict[int, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    progress: Any = context.Queue()
    executor = ProcessPoolExecutor(
        max(1, min(workers, len(tasks))),
        mp_context=context,
        initializer=_start_worker,
        initargs=(progress,),
    )
    with progress_bar(description, total_bytes) as bar:
        documents = 0

        def drain() -> None:
            nonlocal documents
            while True:
                try:
                    more_documents, more_bytes = progress.get_nowait()
                except queue.Empty:
                    break
                documents += more_documents
                bar.update(more_bytes)
            elapsed = bar.format_dict["elapsed"] or 1e-9
            bar.set_postfix_str(f"{documents:,} documents, {documents / elapsed:,.0f} documents/s", refresh=False)

        futures: dict[Future[dict[str, Any]], int] = {}
        try:
            with _signals_held_back():
                futures = {executor.submit(_do_part, task): index for index, task in tasks.items()}
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=_REPORT_SECONDS, return_when=FIRST_COMPLETED)
                drain()
                for future in done:
                    results[futures[future]] = future.result()
            executor.shutdown(wait=True)
            drain()
        except BrokenProcessPool:
            raise UserError(
                f"{description}: a worker process was killed (out of memory?);"
                " run the same command again to continue, with fewer --workers if memory was short"
            ) from None
        except BaseException:
            for process in list((executor._processes or {}).values()):
                process.terminate()
            executor.shutdown(wait=True, cancel_futures=True)
            raise
    return results


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """SIGINT and SIGTERM wait for the end of the block, so that no process is left half started.

    Ctrl-C reaches the whole process group; processes started in the block inherit SIGINT blocked, for it is the
    parent that ends them. The mask is this thread's alone: a handler that only takes note covers the others.
    """
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda received, _: held.append(received))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for received in held:
        signal.raise_signal(received)


def _kept_result(task: _Task) -> dict[str, Any] | None:
    """The result of a part that an earlier run has done, of inputs that have not changed since."""
    if not task.record.exists():
        return None
    record = read_json(task.record)
    result: dict[str, Any] = record["result"]
    return result if record["identity"] == task.identity else None


def _remove_temporary_files(output_dir: Path) -> None:
    for folder in (output_dir, output_dir / PARTS_FOLDER):
        for path in folder.glob(f"*{durable.TEMPORARY_SUFFIX}"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(records: Path) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of one that was killed."""
    with open(records / _LOCK_NAME, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{records.parent}: another process is at work there; wait for it or stop it") from None
        yield


@dataclass(frozen=True)
class Execution:
    """Who does the parts of a job: one flag each of `add_work_arguments`.

    workers: processes of this machine. The other fields are for jobs of many machines.
    """

    workers: int = 1
    overwrite: bool = False
    max_bad_fraction: float = 0.001


class Work:
    """A job at work in `output_dir`; made by `working`."""

    def __init__(self, output_dir: Path, job: dict[str, Any], execution: Execution) -> None:
        self.output_dir, self._job, self._execution = output_dir, job, execution

    @property
    def scratch(self) -> Path:
        """A folder for intermediate files, removed when the job is finished."""
        folder = self.output_dir / PARTS_FOLDER / "scratch"
        folder.mkdir(parents=True, exist_ok=True)
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

        description: names the phase on the bar; one job's phases have different ones.
        part_inputs: the files each part reads, local or remote; a part is done again when one has changed.
        A result may hold "read": {"documents": ...} and "rejected": [...] (`DocumentStream.summary`): the job stops
        with UserError when more than `max_bad_fraction` of the documents are rejected.
        """
        return run_parts(
            function,
            parts,
            part_inputs=part_inputs,
            part_bytes=part_bytes,
            output_dir=self.output_dir,
            job=self._job,
            workers=self._execution.workers,
            description=description,
        )

    def finishes(self) -> bool:
        """True in the one process that writes what the whole job leaves, its manifest last."""
        return True


@contextlib.contextmanager
def working(
    output_dir: Path, job: dict[str, Any], inputs: Sequence[InputFile], execution: Execution
) -> Iterator[Work | None]:
    """The work of `job` in `output_dir`, or None when it is done there already (one line says so).

    job: command and options; an unfinished or finished result of another job is refused. When the block ends well the
    manifest has been written, and what the parts left behind is removed. Raises UserError as `prepare_output` does.
    """
    if not prepare_output(output_dir, job, [Path(file.name) for file in inputs], execution.overwrite):
        yield None
        return
    yield Work(output_dir, job, execution)
    finish_parts(output_dir)


def finish_parts(output_dir: Path) -> None:
    """Forgets the parts' records, after the folder's manifest has been written."""
    shutil.rmtree(output_dir / PARTS_FOLDER, ignore_errors=True)


def _claim(records: Path, job: dict[str, Any]) -> None:
    path = records / _JOB_NAME
    if not path.exists():
        durable.write_json(path, job)
    elif read_json(path) != json.loads(json.dumps(job)):
        raise UserError(
            f"{records.parent} holds the unfinished work of another job (other inputs or options);"
            " give --overwrite to discard it, or another --output_dir"
        )


def prepare_output(output_dir: Path, job: dict[str, Any], inputs: Sequence[Path], overwrite: bool) -> bool:
    """Makes `output_dir` ready for `job`; returns False when the job is done there already (one line says so).

    `overwrite` discards what an earlier run of the same command left there, and nothing else. Raises UserError when
    the folder holds something else, or holds one of the inputs.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file, expected a folder")
    within = [path for path in inputs if path.resolve().is_relative_to(output_dir.resolve())]
    if within:
        raise UserError(f"--output_dir {output_dir} holds the input {within[0]}; give another --output_dir")
    if output_dir.exists() and any(output_dir.iterdir()):
        command = _command_of(output_dir)
        if command != job["command"]:
            found = f"a result of {command!r}" if command else "nothing of ours"
            raise UserError(f"{output_dir} is not empty and holds {found}; give another --output_dir")
        if overwrite:
            shutil.rmtree(output_dir)
        elif is_current(output_dir, job, inputs):
            finish_parts(output_dir)  # of a run that was killed between its manifest and its end
            print(f"{output_dir}: up to date")
            return False
        elif (output_dir / MANIFEST_NAME).exists():
            raise UserError(
                f"{output_dir} holds the result of another job, or its inputs have changed since;"
                " give --overwrite to replace it, or another --output_dir"
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    return True


def _command_of(output_dir: Path) -> str | None:
    """The command whose finished or unfinished work `output_dir` holds."""
    try:
        if (output_dir / MANIFEST_NAME).exists():
            return str(json.loads((output_dir / MANIFEST_NAME).read_bytes())["job"]["command"])
        return str(json.loads((output_dir / PARTS_FOLDER / _JOB_NAME).read_bytes())["command"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
