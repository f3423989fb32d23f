"""Faults for the tests of durable files: the k-th operation of a program and all its workers fails or kills.

`faulty(folder, ...)` gives the environment variables of a program whose os.replace or os.fsync, through which every
durable file goes, meets the fault.
"""

import os
from pathlib import Path

_SITE = """
import os, signal
operation, number, fault, counter = os.environ["DATA_PREP_FAULT"].split(" ", 3)
real = getattr(os, operation)

def faulty(*arguments, **options):
    descriptor = os.open(counter, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b"x")
    count = os.lseek(descriptor, 0, os.SEEK_CUR)  # of all processes together
    os.close(descriptor)
    if count == int(number):
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(int(fault), os.strerror(int(fault)))
    return real(*arguments, **options)

setattr(os, operation, faulty)
"""


def faulty(folder: Path, operation: str, number: int, fault: str) -> dict[str, str]:
    """operation: "replace" or "fsync"; number: from 1; fault: "kill" or an errno; `folder` keeps the count."""
    (folder / "sitecustomize.py").write_text(_SITE)
    return {
        "DATA_PREP_FAULT": f"{operation} {number} {fault} {folder / 'operations'}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
    }
