"""Runs one function over independent parts in worker processes: progress, resume, clean ends.

A part's result is a small dict that is kept, durably, in `<output_dir>/.parts/` as soon as the part is done. A job
that was killed continues with the parts that are missing. The result does not depend on the number of workers.
"""

import json
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep import durable
from data_prep.errors import UserError

PARTS_FOLDER = ".parts"
_JOB_NAME = "job.json"
_REPORT_SECONDS = 0.25

Report = Callable[[int, int], None]
"""Called by a part's function with (documents, bytes of input) done since its last call."""


def available_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class _Task:
    """What a worker process needs to do any part: pickled once a part, so it is kept small."""

    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    record: Path


_progress_queue: Any = None  # set in worker processes only, by _start_worker


def _start_worker(progress: Any) -> None:
    global _progress_queue
    _progress_queue = progress
    # Ctrl-C reaches the whole process group; the parent ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
    durable.write_json(task.record, result)
    return result


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
    part_bytes: Sequence[int],
    output_dir: Path,
    job: dict[str, Any],
    workers: int,
    description: str,
) -> list[dict[str, Any]]:
    """Calls `function(*part, report)` for every part and returns the results in the order of the parts.

    function: importable by name; writes its files under `output_dir` so that they are whole under their final
        names, and returns a JSON-able dict.
    part_bytes: bytes of input of each part, for the bar.
    job: identifies the work; unfinished work of another job in `output_dir` is refused.

    Raises UserError for a part that met bad input, a worker that was killed, or a foreign unfinished job.
    """
    records = output_dir / PARTS_FOLDER
    records.mkdir(parents=True, exist_ok=True)
    _claim(records, job)
    tasks = [_Task(function, part, records / f"{index:06d}.json") for index, part in enumerate(parts)]
    results: dict[int, dict[str, Any]] = {}
    for index, task in enumerate(tasks):
        if task.record.exists():
            results[index] = json.loads(task.record.read_bytes())
    missing = [index for index in range(len(tasks)) if index not in results]
    if results:
        print(f"{description}: {len(results)} of {len(tasks)} parts were done before and are kept")
    context = multiprocessing.get_context("spawn")
    progress: Any = context.Queue()
    executor = ProcessPoolExecutor(
        max(1, min(workers, len(missing))),
        mp_context=context,
        initializer=_start_worker,
        initargs=(progress,),
    )
    with progress_bar(description, sum(part_bytes[index] for index in missing)) as bar:
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
            futures = {executor.submit(_do_part, tasks[index]): index for index in missing}
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
    return [results[index] for index in range(len(tasks))]


def finish_parts(output_dir: Path) -> None:
    """Forgets the parts' records, after the folder's manifest has been written."""
    shutil.rmtree(output_dir / PARTS_FOLDER, ignore_errors=True)


def _claim(records: Path, job: dict[str, Any]) -> None:
    path = records / _JOB_NAME
    if not path.exists():
        durable.write_json(path, job)
    elif json.loads(path.read_bytes()) != json.loads(json.dumps(job)):
        raise UserError(
            f"{records.parent} holds the unfinished work of another job (other inputs or options);"
            " give --overwrite to discard it, or another --output_dir"
        )


def prepare_output(output_dir: Path, job: dict[str, Any], inputs: Sequence[Path], overwrite: bool) -> bool:
    """Makes `output_dir` ready for `job`; returns False when the job is done there already (one line says so).

    Raises UserError when the folder holds something else and `overwrite` is not set.
    """
    from data_prep.manifest import MANIFEST_NAME, is_current

    if overwrite:
        shutil.rmtree(output_dir, ignore_errors=True)
    elif is_current(output_dir, job, inputs):
        print(f"{output_dir}: up to date")
        return False
    elif (output_dir / MANIFEST_NAME).exists():
        raise UserError(
            f"{output_dir} holds the result of another job, or its inputs have changed since;"
            " give --overwrite to replace it, or another --output_dir"
        )
    elif output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / PARTS_FOLDER).exists():
        raise UserError(f"{output_dir} is not empty and holds nothing of ours; give another --output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    return True
