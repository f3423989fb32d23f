"""Ends a run that no longer gets on, saying which rank is behind; names ranks that are slower than the others.

A thread of each rank writes, every second or so, into the store of the process group (a connection of its own: the
group's is blocked while a rank waits) where its main thread is. A rank that has been in one place for too long says so
there. Then all of them write their stacks to `logs/rank_N.stacks`, tell each other where they are, and leave; one that
does not answer, because it is stopped, say, is killed by the others of its host.
"""

import contextlib
import datetime
import faulthandler
import json
import logging
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from data_prep.durable import host_name
from pipeline.interruption import EXIT_HUNG
from pipeline.startup import World

Item = TypeVar("Item")

_PATIENT = ("first step", "evaluation", "checkpoint")
_PATIENCE = 4.0
_STORE_SECONDS = 3.0  # for one answer of the store
_ANSWER_SECONDS = 4.0  # for all ranks to say where they are
_LINGER_SECONDS = 2.0
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
_SLOW = 1.5  # times the median of all ranks
_SLOW_LOOKS = 3
_LOOK_SECONDS = 20.0
_WORTH_SECONDS = 0.02  # differences of shorter work are noise


@dataclass(frozen=True)
class Place:
    """Where a rank's main thread is. step: from 1. waits: in a collective operation, for other ranks."""

    phase: str
    step: int
    where: str
    waits: bool


def place_of(frame: FrameType | None, phase: str, step: int) -> Place:
    """Looks at a thread's stack, innermost frame first."""
    innermost = "" if frame is None else _named(frame)
    found, waits = frame, False
    while found is not None:
        if any(part in found.f_code.co_filename for part in _COLLECTIVES):
            waits = True
        found = found.f_back
    return Place(phase, step, innermost, waits)


def _named(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_name} ({'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno})"


def behind(places: Mapping[int, Place], size: int) -> tuple[list[int], str]:
    """The ranks that the others wait for, as far as that can be told, and a sentence that says so.

    places: of the ranks that answered.
    """
    silent = [rank for rank in range(size) if rank not in places]
    if silent:
        return silent, f"{_ranks(silent)} did not answer: stopped, or its machine is gone"
    first = min(place.step for place in places.values())
    late = [rank for rank, place in places.items() if place.step == first]
    if len(late) < size:
        return late, f"{_ranks(late)} is at step {first}, others are further: {_described(places, late)}"
    busy = [rank for rank, place in places.items() if not place.waits]
    if busy and len(busy) < size:
        return busy, f"the others wait for {_ranks(busy)} at step {first}: {_described(places, busy)}"
    if busy:
        return [], f"no rank waits for another at step {first}: {_described(places, list(places))}"
    return [], f"all ranks wait for each other at step {first}: {_described(places, list(places))}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _described(places: Mapping[int, Place], ranks: Sequence[int]) -> str:
    named = [f"rank {rank} in {places[rank].phase}, {places[rank].where}" for rank in ranks[:4]]
    return "; ".join(named) + ("; ..." if len(ranks) > 4 else "")


class Stragglers:
    """Tells ranks whose own work takes longer than the others', look by look."""

    def __init__(self) -> None:
        self._looks: dict[int, int] = {}

    def look(self, seconds: Mapping[int, float]) -> list[int]:
        """seconds: of each rank's own work in its recent steps. Ranks that were slow for the third time in a row, and
        every time twice as often since."""
        median = statistics.median(seconds.values())
        named = []
        for rank, own in seconds.items():
            slow = own > _SLOW * median and own - median > _WORTH_SECONDS
            looks = self._looks[rank] = self._looks.get(rank, 0) + 1 if slow else 0
            if looks >= _SLOW_LOOKS and looks % _SLOW_LOOKS == 0 and (looks // _SLOW_LOOKS).bit_count() == 1:
                named.append(rank)
        return named


class Watchdog:
    """Watches this rank. Made, and closed, by all ranks together; `enter` says where the main thread is.

    seconds: that a phase may take (4 times as many: the first step, an evaluation, a checkpoint); 0 watches nothing.
    """

    def __init__(self, world: World, seconds: float, output_dir: Path, logger: logging.Logger) -> None:
        self._world, self._seconds, self._logger = world, seconds, logger
        self._stacks = output_dir / "logs" / f"rank_{world.rank}.stacks"
        self._place = ("start", 0)
        self._since = time.monotonic()
        self._own: list[float] = []
        self._closed, self._ending = threading.Event(), threading.Event()
        self._main = threading.main_thread().ident
        self._seen_ending = False
        self._stragglers = Stragglers()
        if not seconds:
            return
        # A process id means something to its own host alone.
        self._processes = world.gather((host_name(), os.getpid()))
        self._interval = min(1.0, seconds / 10)
        for target in (self._beat, self._watch):
            threading.Thread(target=target, daemon=True).start()

    def enter(self, phase: str, step: int) -> None:
        """The main thread begins something; step: from 1."""
        self._place, self._since = (phase, step), time.monotonic()

    def along(self, items: Iterable[Item], phase: str, step: int) -> Iterator[Item]:
        """The items, each of which is progress: what takes many of them may take long."""
        for item in items:
            self.enter(phase, step)
            yield item

    def worked(self, seconds: float) -> None:
        """This rank's own work of a step took so long."""
        self._own = [*self._own[-15:], seconds]

    def close(self) -> None:
        """Ends the watch. While it is ending this process it stays for that: the main thread, which another rank's end
        may have woken with an error, must not leave before it is said what happened."""
        self._closed.set()
        if self._ending.is_set():
            threading.Event().wait(_ANSWER_SECONDS + _STORE_SECONDS + _LINGER_SECONDS + 1)

    def _limit(self, phase: str) -> float:
        return self._seconds * (_PATIENCE if phase in _PATIENT else 1.0)

    def _store(self) -> Any:
        """A connection of one thread's own to the store that rank 0's process (or its agent) keeps."""
        from torch.distributed import PrefixStore, TCPStore

        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=_STORE_SECONDS),
        )
        # torchrun keeps one store through its restarts.
        return PrefixStore(f"watchdog{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}", store)

    def _beat(self) -> None:
        """Tells how long this rank's own work takes, and sees that another has found the end."""
        looked = time.monotonic()
        with contextlib.suppress(RuntimeError):  # the store goes with the process that keeps it
            store = self._store()
            while not self._closed.wait(self._interval):
                if self._own:
                    store.set(f"own/{self._world.rank}", json.dumps(statistics.median(self._own)))
                self._seen_ending = bool(store.check(["ending"]))
                if self._world.is_first and time.monotonic() - looked > _LOOK_SECONDS:
                    looked = time.monotonic()
                    self._name_stragglers(store)

    def _name_stragglers(self, store: Any) -> None:
        keys = [f"own/{rank}" for rank in range(self._world.size)]
        if len(keys) < 2 or not store.check(keys):
            return
        seconds = dict(enumerate(json.loads(value) for value in store.multi_get(keys)))
        for rank in self._stragglers.look(seconds):
            self._logger.info(
                f"slow      rank {rank}: its own work takes {seconds[rank]:.3f} s, the median of all is"
                f" {statistics.median(seconds.values()):.3f} s"
            )

    def _watch(self) -> None:
        woken = time.monotonic()
        while not self._closed.wait(self._interval):
            slept, woken = time.monotonic() - woken, time.monotonic()
            if slept > 5 * self._interval + 1:  # the whole process was stopped (Ctrl-Z) and goes on
                self._since += slept
            phase, _ = self._place
            late = time.monotonic() - self._since
            if late > self._limit(phase) or self._seen_ending:
                self._end(late)

    def _end(self, late: float) -> None:
        """Ends this process, whatever becomes of what it has to say."""
        self._ending.set()
        try:
            self._report(late)
        finally:
            if self._world.is_first:
                time.sleep(_LINGER_SECONDS)  # the store goes with this process
            os._exit(EXIT_HUNG)

    def _report(self, late: float) -> None:
        """Writes the stacks, finds out who is behind, has it said once, and kills who does not answer on this host."""
        phase, step = self._place
        place = place_of(sys._current_frames().get(self._main or 0), phase, step)
        with contextlib.suppress(OSError), open(self._stacks, "w") as file:  # a full disk, say
            print(f"rank {self._world.rank}, {late:.0f} s in {phase} of step {step}", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        places: dict[int, Place] = {}
        # In a thread of its own: a store whose process is stopped does not answer at all.
        asking = threading.Thread(target=self._exchange, args=(place, places), daemon=True)
        asking.start()
        asking.join(_ANSWER_SECONDS + _STORE_SECONDS)
        if places or self._world.is_first:
            places = places or {self._world.rank: place}
            late_ranks, why = behind(places, self._world.size)
            reporter = min(places)
        else:
            places = {self._world.rank: place}
            late_ranks, why = (
                [0],
                "rank 0, which keeps the group's store, did not answer: stopped, or its machine is gone",
            )
            reporter = 1
        for rank in late_ranks if len(places) < self._world.size else ():
            host, pid = self._processes[rank]
            if rank not in places and host == host_name():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        line = f"no progress for {late:.0f} s (faults.hang_seconds {self._seconds:g}); {why}"
        with contextlib.suppress(OSError):
            if self._world.rank == reporter:
                where = self._stacks.with_name("rank_N.stacks")
                print(f"error: {line}; stacks in {where}", file=sys.stderr, flush=True)
            if not self._world.is_first:  # whose log is the terminal
                self._logger.error(line)
            logging.shutdown()

    def _exchange(self, place: Place, places: dict[int, Place]) -> None:
        """Fills `places` with what each rank says, once all have, or after a while with those that did."""
        with contextlib.suppress(RuntimeError):
            store = self._store()
            store.set("ending", "")
            store.set(f"place/{self._world.rank}", json.dumps(asdict(place)))
            until = time.monotonic() + _ANSWER_SECONDS
            missing = set(range(self._world.size))
            found: dict[int, Place] = {}
            while missing and time.monotonic() < until:
                for rank in sorted(missing):
                    if store.check([f"place/{rank}"]):
                        found[rank] = Place(**json.loads(store.get(f"place/{rank}")))
                missing -= set(found)
                time.sleep(0.1)
            places.update(found)
