"""Who does the parts of a phase: processes of this machine, tasks that share a file system, or a Ray cluster.

All three do the same thing with a part (`do_part`): call its function, then keep its small result, durably, in a
record. A phase is over when every part has a record of its present identity; it does not matter who wrote it.
"""

import contextlib
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import queue
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.errors import UserError
from data_prep.progress import REPORT_SECONDS, Progress, Report
from data_prep.rejections import Tolerance

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
_POLL_SECONDS = 0.2
_SAY_AFTER_SECONDS = 2.0
_PRELOADED = ("data_prep.executors", "concurrent.futures.process", "numpy")
_RAY_RETRIES = 3
_CONNECT_SECONDS = 10.0


Done = tuple[int, dict[str, Any]]
"""What a worker hands back of a part: the documents that it reported, and the part's result."""


class JobVanishedError(Exception):
    """The job's records are gone: another task has finished the job, or somebody has removed it."""


@dataclass(frozen=True)
class PartTask:
    """What a worker needs to do one part: pickled once a part, so it is kept small.

    identity: equal for the same part of files that have not been touched; inputs: the files' names; bytes: of input.
    """

    index: int
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    identity: str
    record: Path
    inputs: tuple[str, ...]
    bytes: int

    def kept_result(self) -> dict[str, Any] | None:
        """The result of this very part, if somebody has done it; raises UserError for a damaged record."""
        try:
            content = self.record.read_bytes()
        except FileNotFoundError:
            return None
        try:
            record = json.loads(content)
            result: dict[str, Any] = record["result"]
            return result if record["identity"] == self.identity else None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.record} is damaged ({error!r}): remove it and run the command again") from None


def do_part(task: PartTask, report: Report) -> dict[str, Any]:
    """Does a part and keeps its result; an error that has no file's name gets those of the part's inputs."""
    try:
        result = task.function(*task.arguments, report)
        if task.record.parent.is_dir():  # it is gone when another task has finished the whole job meanwhile
            durable.write_json(task.record, {"identity": task.identity, "result": result})
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = f"part {task.index}: {', '.join(task.inputs[:3]) or task.record}"
        raise
    except MemoryError:
        raise UserError(
            f"part {task.index} ({', '.join(task.inputs[:3])}): out of memory; run the same command again with fewer"
            " --workers or smaller parts"
        ) from None
    return result


class Phase:
    """The parts of one phase and what is known of them, from whoever did them."""

    def __init__(self, tasks: Sequence[PartTask], description: str, records: Path, tolerance: Tolerance) -> None:
        """records: the folder that holds every task's record."""
        self.tasks, self.description, self.records = tasks, description, records
        self.results: dict[int, dict[str, Any]] = {}
        self._tolerance = tolerance
        self._other_records: dict[int, int] = {}

    @property
    def complete(self) -> bool:
        return len(self.results) == len(self.tasks)

    def progress(self) -> Progress:
        """A bar over all parts, those that are done already included."""
        done = sum(self.tasks[index].bytes for index in self.results)
        return Progress(self.description, sum(task.bytes for task in self.tasks), done)

    def missing(self) -> list[int]:
        return [index for index in range(len(self.tasks)) if index not in self.results]

    def add(
        self,
        index: int,
        result: dict[str, Any],
        progress: Progress | None = None,
        documents: int | None = None,
    ) -> None:
        """A part is done; raises UserError when too many documents have been rejected by now.

        documents: as the part reported them; of a part that others have done they are in the result, if anywhere.
        """
        if index in self.results:
            return
        self.results[index] = result
        if progress is not None:
            if documents is None:
                documents = result.get("read", {}).get("documents", result.get("documents"))
            progress.done(index, documents, self.tasks[index].bytes)
        self._tolerance.add(index, result, self.tasks[index].bytes)

    def find_records(self, progress: Progress | None = None) -> None:
        """Takes up what earlier runs or other tasks have done since the last call.

        Raises JobVanishedError when the folder of records is gone.
        """
        try:
            with os.scandir(self.records) as entries:
                found = [(int(entry.name[:-5]), entry) for entry in entries if entry.name.endswith(".json")]
        except FileNotFoundError:
            raise JobVanishedError(f"{self.records} is gone") from None
        for index, entry in found:
            if index in self.results or index >= len(self.tasks):
                continue
            with contextlib.suppress(FileNotFoundError):
                changed = entry.stat().st_mtime_ns
                if self._other_records.get(index) == changed:
                    continue
                result = self.tasks[index].kept_result()
                if result is None:
                    self._other_records[index] = changed  # of input that has changed since; not read again and again
                else:
                    self.add(index, result, progress)

    def finish(self) -> list[dict[str, Any]]:
        """All results in the parts' order; raises UserError when too many documents were rejected."""
        self._tolerance.finish()
        return [self.results[index] for index in range(len(self.tasks))]


# ---------------------------------------------------------------------------------------------- claims, for array tasks


class Claims:
    """What this task has taken on, so that others leave it alone: files that a thread touches every few seconds.

    A claim that its owner has not touched for `stale_seconds`, by this task's own clock, or whose owner was a process
    of this host that is gone, may be taken over. That two tasks hold one claim is possible (its owner was only slow)
    and does no harm: they write the same bytes.
    """

    def __init__(self, stale_seconds: float = STALE_SECONDS, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
        self._stale_seconds, self._heartbeat_seconds = stale_seconds, heartbeat_seconds
        self._held: dict[Path, str] = {}
        self._seen: dict[Path, tuple[tuple[str, int], float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for path in list(self._held):
            self.release(path)

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat_seconds):
            for path in list(self._held):
                with contextlib.suppress(OSError):
                    os.utime(path)

    def holds(self, path: Path) -> bool:
        return path in self._held

    def take(self, path: Path) -> bool:
        """Claims `path` unless somebody else holds it; raises JobVanishedError when its folder is gone."""
        content = f"{durable.host_name()} {os.getpid()} {secrets.token_hex(8)}"
        try:
            if not durable.create(path, content.encode()):
                return False
        except FileNotFoundError:
            raise JobVanishedError(f"{path.parent} is gone") from None
        self._held[path] = content
        return True

    def take_over(self, path: Path) -> bool:
        """Claims what its owner has abandoned; False as long as that is not sure."""
        try:
            with open(path) as file:  # opening asks a network file system for the present state
                seen = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return self.take(path)
        now = time.monotonic()
        before, since = self._seen.get(path, (None, now))
        if before != seen:
            self._seen[path] = seen, now
            since = now
        if now - since < self._stale_seconds and not self._owner_is_gone(seen[0]):
            return False
        aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.stale")
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return False
        if aside.read_text() != seen[0]:  # another task was faster: this is its new claim
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)
        return self.take(path)

    def _owner_is_gone(self, content: str) -> bool:
        host, _, rest = content.partition(" ")
        pid = rest.partition(" ")[0]
        return pid.isdecimal() and (
            durable.is_running(host, int(pid)) is False
            or (host == durable.host_name() and int(pid) == os.getpid() and content not in self._held.values())
        )

    def release(self, path: Path) -> None:
        content = self._held.pop(path, None)
        with contextlib.suppress(OSError):
            if content is not None and path.read_text() == content:
                path.unlink()


@dataclass(frozen=True)
class Share:
    """The place of this array task among all: it begins with the parts index, index + number, ...

    folder: of this phase's claims.
    """

    claims: Claims
    folder: Path
    index: int
    number: int

    def order(self, parts: int) -> Iterator[int]:
        """All parts: its own share first, then the others' from the next task's on."""
        for first in range(self.number):
            yield from range((self.index + first) % self.number, parts, self.number)


# ------------------------------------------------------------------------------------------ processes of this machine

_progress_queue: Any = None  # set in worker processes only, by _start_worker


def _start_worker(progress: Any) -> None:
    global _progress_queue
    _progress_queue = progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise wait for its next part for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do_part_in_worker(task: PartTask) -> Done:
    all_documents = documents = size = 0
    last = time.monotonic()

    def report(more_documents: int, more_bytes: int) -> None:
        nonlocal all_documents, documents, size, last
        all_documents += more_documents
        documents, size = documents + more_documents, size + more_bytes
        now = time.monotonic()
        if now - last >= REPORT_SECONDS:
            _progress_queue.put((task.index, documents, size))
            documents, size, last = 0, 0, now

    result = do_part(task, report)
    return all_documents, result


class _AllParts:
    """The missing parts of a phase that this process does alone."""

    def __init__(self, phase: Phase, workers: int) -> None:
        self.at_once = 2 * workers  # so that a worker always finds its next part
        self._missing = iter(phase.missing())

    def next(self) -> int | None:
        return next(self._missing, None)

    def done(self, index: int) -> None:
        pass

    def wait_for_others(self, *, idle: bool) -> None:
        pass


class _SharedParts:
    """The missing parts of a phase that many tasks do: one hands out what it could claim."""

    def __init__(self, phase: Phase, workers: int, share: Share, progress: Progress) -> None:
        self.at_once = workers  # what waits here is kept from others
        self._phase, self._share, self._progress = phase, share, progress
        self._untried = share.order(len(phase.tasks))
        self._retried: Iterator[int] = iter(())
        self._next_look = 0.0
        self._idle_since: float | None = None

    def next(self) -> int | None:
        claims = self._share.claims
        for parts, take in ((self._untried, claims.take), (self._retried, claims.take_over)):
            for index in parts:
                path = self._claim(index)
                if index in self._phase.results or claims.holds(path) or not take(path):
                    continue
                result = self._phase.tasks[index].kept_result()  # done since we last looked?
                if result is None:
                    return index
                claims.release(path)
                self._phase.add(index, result, self._progress)
        return None

    def done(self, index: int) -> None:
        self._share.claims.release(self._claim(index))

    def wait_for_others(self, *, idle: bool) -> None:
        """Now and then takes up what others have done, and tries again for what they have abandoned."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._phase.find_records(self._progress)
        missing = self._phase.missing()
        self._retried = iter(missing)
        took = time.monotonic() - now
        self._next_look = now + took + max(_POLL_SECONDS, 20 * took)
        if not idle or not missing:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif self._idle_since and now - self._idle_since > _SAY_AFTER_SECONDS:
            self._idle_since = 0.0  # said once
            self._progress.note(
                f"{self._phase.description}: waiting for {len(missing)} parts that other tasks have taken on, such as"
                f" part {missing[0]}; what nobody keeps alive for {STALE_SECONDS:.0f} s is taken over"
            )

    def _claim(self, index: int) -> Path:
        return self._share.folder / f"{index:06d}"


def run_in_processes(phase: Phase, workers: int, output_dir: Path, share: Share | None = None) -> None:
    """Does the missing parts in worker processes, which have ended when this returns or raises.

    share: of an array task; it does only parts that it could claim, and waits for those of others.
    """
    missing = phase.missing()
    if not missing:
        return
    workers = min(workers, len(missing))
    module = phase.tasks[missing[0]].function.__module__
    with phase.progress() as progress, _Pool(workers, module, output_dir) as pool:
        parts = _AllParts(phase, workers) if share is None else _SharedParts(phase, workers, share, progress)
        try:
            while not phase.complete:
                pool.fill(phase, parts)
                for index, future in pool.finished(progress):
                    _take_up(index, future, phase, progress, shared=share is not None)
                    parts.done(index)
                parts.wait_for_others(idle=not pool.at_work)
        except BrokenProcessPool:
            raise UserError(
                f"{phase.description}: a worker process was killed (out of memory?);"
                " run the same command again to continue, with fewer --workers if memory was short"
            ) from None


def _take_up(index: int, future: Future[Done], phase: Phase, progress: Progress, *, shared: bool) -> None:
    """Adds a part's result, or raises its error, unless another task has done that part meanwhile."""
    try:
        documents, result = future.result()
    except BrokenProcessPool:
        raise
    except Exception:
        if shared:
            phase.find_records(progress)
        if index not in phase.results:
            raise
    else:
        phase.add(index, result, progress, documents)


def start_worker_server(modules: Sequence[str]) -> None:
    """Starts the process from which workers are forked, unless it runs already; returns at once.

    It imports `modules` once for all workers, and does nothing else: 16 workers are at work after 0.3 s where each
    importing for itself takes 3.7 s, on two cores. A stage starts it early, so that it imports while the stage reads
    its own input.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([*modules, *_PRELOADED])
    with _signals_held_back():
        forkserver.ensure_running()


class _Pool:
    """Worker processes and the parts that they are at."""

    def __init__(self, workers: int, module: str, output_dir: Path) -> None:
        self.at_work: dict[Future[Done], int] = {}
        self._output_dir = output_dir
        self._pids: set[int] = set()
        start_worker_server([module])
        context = multiprocessing.get_context("forkserver")
        self._reports: Any = context.Queue()
        self._executor = ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(self._reports,)
        )

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self.at_work:
            self._executor.shutdown(wait=True)
        else:  # parts that others have done in the meantime are given up as well
            for process in list((self._executor._processes or {}).values()):
                process.terminate()
            self._executor.shutdown(wait=True, cancel_futures=True)
            durable.remove_temporary_files(self._output_dir, ended=self._pids)
        self._reports.close()

    def fill(self, phase: Phase, parts: "_AllParts | _SharedParts") -> None:
        """Hands out parts until enough are at work or there are no more."""
        while len(self.at_work) < parts.at_once and (index := parts.next()) is not None:
            with _signals_held_back():
                self.at_work[self._executor.submit(_do_part_in_worker, phase.tasks[index])] = index
                self._pids |= set(self._executor._processes or {})

    def finished(self, progress: Progress) -> list[tuple[int, Future[Done]]]:
        """Waits a moment for parts to be done; passes on what the processes have reported."""
        if self.at_work:
            done = wait(self.at_work, timeout=REPORT_SECONDS, return_when=FIRST_COMPLETED).done
        else:
            time.sleep(_POLL_SECONDS)
            done = set()
        with contextlib.suppress(queue.Empty):
            while True:
                progress.report(*self._reports.get_nowait())
        return [(self.at_work.pop(future), future) for future in done]


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """SIGINT and SIGTERM wait for the end of the block, so that no process is left half started.

    Ctrl-C reaches the whole process group; processes started in the block inherit SIGINT blocked, for it is the
    parent that ends them. The mask is this thread's alone: a handler that only takes note covers the others.
    """
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread has handlers
        yield
        return
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


# ------------------------------------------------------------------------------------------------------ a Ray cluster


def run_on_ray(phase: Phase, address: str) -> None:
    """Does the missing parts as remote tasks of one core each; nothing of ours runs there when this returns or raises.

    address: of the cluster, as `ray.init` takes it; a connection that the process has already is used and kept. The
    nodes share the file system that holds input and output, and can import data_prep from where it is here.
    """
    if phase.complete:
        return
    try:
        ray = importlib.import_module("ray")  # an optional extra
    except ImportError:
        raise UserError("--executor ray needs the package ray: pip install 'ray>=2.40'") from None
    connected = ray.is_initialized()
    if not connected:
        _connect(ray, address)
    try:
        _run_remote_tasks(ray, phase)
    finally:
        if not connected:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--ray_address {address}: no Ray cluster could be reached ({reason}); start one with `ray start --head`,"
            " or give its address"
        ) from None
    finally:
        for number, handler in handlers.items():  # Ray installs its own
            signal.signal(number, handler)


def _run_remote_tasks(ray: Any, phase: Phase) -> None:
    remote = ray.remote(num_cpus=1, max_retries=_RAY_RETRIES)(_do_part_remotely)
    in_flight = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    at_work: dict[Any, int] = {}
    missing = iter(phase.missing())
    with phase.progress() as progress:
        try:
            while not phase.complete:
                for index in itertools.islice(missing, in_flight - len(at_work)):
                    at_work[remote.remote(phase.tasks[index])] = index
                for reference in ray.wait(list(at_work), timeout=REPORT_SECONDS)[0]:
                    index = at_work.pop(reference)
                    documents, result = ray.get(reference)
                    phase.add(index, result, progress, documents)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except ray.exceptions.RayError as error:
            raise UserError(
                f"{phase.description}: Ray lost a task {_RAY_RETRIES + 1} times ({type(error).__name__}; out of"
                " memory?); run the same command again to continue"
            ) from None
        finally:
            for reference in at_work:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.cancel(reference, force=True)


def _do_part_remotely(task: PartTask) -> Done:
    reported: list[int] = []
    result = do_part(task, lambda documents, size: reported.append(documents))
    return sum(reported), result
