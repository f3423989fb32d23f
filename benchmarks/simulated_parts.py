"""How many workers one job can keep busy: parts that only wait, so that a laptop can stand for a large machine.

python benchmarks/simulated_parts.py [--workers 1 4 16 64] [--parts 8] [--seconds 0.5]
Each worker gets `--parts` parts of `--seconds` each. What the job takes beyond that is ours: starting the workers,
handing out parts, keeping their results durably, ending. Efficiency is what it should take over what it took.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_prep.executors import start_worker_server
from data_prep.files import InputFile
from data_prep.manifest import Manifest
from data_prep.parts import Execution, working
from data_prep.progress import Report


def wait(number: int, seconds: float, report: Report) -> dict[str, Any]:
    """A part that takes its time and no processor."""
    time.sleep(seconds)
    report(1, 1)
    return {"number": number}


def seconds_of(workers: int, parts: int, seconds: float) -> float:
    """Wall time of a job of `workers` * `parts` parts."""
    import simulated_parts  # so that workers find `wait` by name

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        started = time.perf_counter()
        inputs: list[InputFile] = []
        with working(Path(name) / "out", {"command": "wait"}, inputs, Execution(workers=workers)) as work:
            assert work is not None
            results = work.run(
                simulated_parts.wait,
                [(number, seconds) for number in range(workers * parts)],
                part_inputs=[[]] * (workers * parts),
                part_bytes=[1] * (workers * parts),
                description="wait",
            )
            assert [result["number"] for result in results] == list(range(workers * parts))
            Manifest(kind="test", job=work.job, files={}).write(work.output_dir)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--parts", type=int, default=8, help="of each worker (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each part (default: %(default)s)")
    arguments = parser.parse_args()
    start_worker_server(["simulated_parts"])
    ideal = arguments.parts * arguments.seconds
    print(f"{arguments.parts} parts of {arguments.seconds:g} s a worker: {ideal:g} s if nothing else took any time")
    for workers in arguments.workers:
        took = seconds_of(workers, arguments.parts, arguments.seconds)
        print(f"{workers:>5} workers  {took:7.2f} s  efficiency {ideal / took:5.1%}", flush=True)


if __name__ == "__main__":
    main()
