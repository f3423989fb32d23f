"""What the programs of benchmarks/samples.py, ours and the peers', measure in the same way."""

import json
import time
from collections.abc import Callable
from pathlib import Path


def samples_per_second(make: Callable[[int], object], batch_size: int, seconds: float) -> None:
    """Calls make(0), make(1), ..., each a batch, for `seconds`; the first two are not counted.

    Prints samples a second of processor time, which neighbours on the machine hardly change, and the share of a core
    that the process had: less than 1 where others took the rest, or where it waited.
    """
    for step in range(2):
        make(step)
    step, started, processor = 2, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - started) < seconds:
        make(step)
        step += 1
    processor = time.process_time() - processor
    print(json.dumps({"rate": (step - 2) * batch_size / processor, "core": processor / elapsed}))


class FirstBatch:
    """What a start costs from here, where everything is imported, to `report`."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is the imports'
        self._resident, self._started = _status("VmRSS"), time.perf_counter()

    def report(self) -> None:
        """Prints the seconds, and by how many megabytes (10^6) the peak is above the imports."""
        seconds = time.perf_counter() - self._started
        print(json.dumps({"seconds": seconds, "megabytes": (_status("VmHWM") - self._resident) / 1e6}))


def _status(field: str) -> int:
    """A size out of /proc/self/status, in bytes."""
    return int(Path("/proc/self/status").read_text().partition(field + ":")[2].split()[0]) * 1024


def read_ahead(path: Path | str) -> None:
    """Reads a file once, so that what follows finds it in the page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
