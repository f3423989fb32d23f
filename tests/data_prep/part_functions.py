"""Part functions for the tests of jobs, importable by worker processes; and a job of two phases as a program.

python part_functions.py OUTPUT_DIR INPUT_DIR [flags of add_work_arguments], with SLOW=seconds that a part takes
"""

import argparse
import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from data_prep import durable
from data_prep.errors import UserError
from data_prep.files import InputFile
from data_prep.manifest import FileRecord, Manifest
from data_prep.parts import Execution, add_work_arguments, working


def called(folder: str, name: object) -> None:
    """Notes, in a file that survives everything, that a part was begun."""
    with open(Path(folder) / f"calls-{name}", "a") as file:
        file.write(f"{os.getpid()}\n")


def double(number, folder, report):
    called(folder, number)
    report(1, 1)
    return {"value": 2 * number}


def fail(number, folder, report):
    if number == 1:
        raise OSError(28, "No space left on device", "the/file")
    return {}


def fail_to_read(number, folder, report):
    raise OSError(5, "Input/output error")


def fill_up(number, path, report):
    """Writes more than the limit that stands for a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    with durable.replacing(Path(path)) as file:
        for _ in range(100):
            file.write(bytes(10_000))
    return {}


def run_out_of_memory(number, folder, report):
    raise MemoryError


def die(number, folder, report):
    durable.temporary_name(Path(folder) / "a.bin").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(number, folder, report):
    """The first call for part 2 dies, with half a file written."""
    called(folder, number)
    if number == 2 and len((Path(folder) / "calls-2").read_text().splitlines()) == 1:
        die(number, folder, report)
    return {"value": number}


def touch(path, report):
    Path(path).write_text("other content")
    return {}


def wait_for_release(number, folder, report):
    called(folder, number)
    while not (Path(folder) / "release").exists():
        time.sleep(0.01)
    return {"value": number}


def reject(number, documents, bad, report):
    records = [
        {"file": f"in-{number}", "line": line + 1, "category": "malformed", "reason": "oops"} for line in range(bad)
    ]
    return {
        "read": {"documents": documents},
        "rejected": [*records, {"file": f"in-{number}", "line": 99, "category": "empty", "reason": "empty document"}],
        "rejected_documents": {"malformed": bad, "empty": 1},
    }


def digest_file(path, output, notes, report):
    """Phase 1: the sha256 of a file, in a scratch file."""
    called(notes, f"1-{Path(path).name}")
    time.sleep(float(os.environ.get("SLOW", "0")))
    content = Path(path).read_bytes()
    durable.write_bytes(Path(output), hashlib.sha256(content).hexdigest().encode())
    report(1, len(content))
    return {"bytes": len(content)}


def combine(paths, output, notes, report):
    """Phase 2: what some files of phase 1 hold, in a file of the result."""
    called(notes, f"2-{Path(output).name}")
    time.sleep(float(os.environ.get("SLOW", "0")))
    content = b"\n".join(Path(path).read_bytes() for path in paths)
    durable.write_bytes(Path(output), content)
    report(1, len(content))
    return {"sha256": hashlib.sha256(content).hexdigest()}


def two_phases(inputs: list[Path], output_dir: Path, notes: Path, execution: Execution) -> bool:
    """A job whose second phase reads what the first wrote; False when it was done already."""
    files = [InputFile.of(str(path)) for path in inputs]
    with working(output_dir, {"command": "two_phases"}, files, execution) as work:
        if work is None:
            return False
        scratch = [str(work.scratch / path.name) for path in inputs]
        work.run(
            digest_file,
            [(str(path), made, str(notes)) for path, made in zip(inputs, scratch, strict=True)],
            part_inputs=[[str(path)] for path in inputs],
            part_bytes=[file.bytes for file in files],
            description="digest",
        )
        names = [f"result-{number}" for number in range(3)]
        results = work.run(
            combine,
            [(scratch[number::3], str(output_dir / name), str(notes)) for number, name in enumerate(names)],
            part_inputs=[scratch[number::3] for number in range(3)],
            part_bytes=[1] * 3,
            description="combine",
        )
        if work.finishes():
            records = {name: FileRecord.of(output_dir / name) for name in names}
            assert [record.sha256 for record in records.values()] == [result["sha256"] for result in results]
            Manifest(kind="test", job=work.job, files=records).write(output_dir)
    return True


if __name__ == "__main__":
    from data_prep.__main__ import handle_signals

    handle_signals()
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("input_dir", type=Path)
    add_work_arguments(parser)
    arguments = parser.parse_args()
    notes = arguments.input_dir.parent / "notes"
    notes.mkdir(exist_ok=True)
    import part_functions  # so that the functions have a name that workers can import

    try:
        part_functions.two_phases(
            sorted(arguments.input_dir.iterdir()),
            arguments.output_dir,
            notes,
            Execution.of(arguments),
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
