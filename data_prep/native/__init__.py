"""The kernels in C: one shared library a source file, built when the project is installed, loaded with ctypes.

Each `NAME.c` beside this file is the library `load("NAME")`. They take plain arrays, allocate no Python objects and
run without the interpreter's lock.
"""

import ctypes
import functools
import importlib.machinery
from pathlib import Path

from data_prep.errors import UserError


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The compiled library of `NAME.c`; raises UserError when it has not been built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"{name}{suffix}")
        if path.exists():
            return ctypes.CDLL(str(path))
    raise UserError(
        f"the compiled part of data_prep ({name}) is missing: install a C compiler (on Debian: apt install gcc) and"
        " the project again (make, or pip install --editable .)"
    )
