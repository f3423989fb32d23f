"""Random numbers as pure functions of their coordinates: nothing to save, any one can be jumped to.

`hash64` is the finalizer of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"),
chained over the coordinates. `permute` is a keyed bijection: a balanced Feistel network (Luby & Rackoff 1988) with
additions modulo the root of the next square, walked along its cycle until it falls into range (Black & Rogaway 2002,
"Ciphers with arbitrary finite domains", sections 3 and 4): a square is so near that hardly any value needs a second
step. Both take arrays.
"""

import ctypes
import functools
import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import native

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 6

UInt64 = NDArray[np.uint64]


def _mix(value: UInt64) -> UInt64:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def hash64(*coordinates: Any) -> UInt64:
    """64 random bits for each combination of the coordinates (non-negative integers or arrays that broadcast)."""
    numbers = list(itertools.takewhile(lambda coordinate: isinstance(coordinate, int), coordinates))
    state = np.array([_chained(*numbers)], dtype=np.uint64)
    with np.errstate(over="ignore"):
        for coordinate in coordinates[len(numbers) :]:
            state = _mix((state + _GOLDEN) ^ (np.asarray(coordinate).astype(np.uint64) * _GOLDEN))
    return state


@functools.lru_cache(maxsize=4096)
def _chained(*numbers: int) -> int:
    """The state after coordinates that are plain numbers: arithmetic as in `hash64`, without arrays."""
    state, golden, low = 0, int(_GOLDEN), (1 << 64) - 1
    for number in numbers:
        state = ((state + golden) & low) ^ ((number * golden) & low)
        for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
            state = ((state ^ (state >> shift)) * int(factor)) & low
        state ^= state >> 31
    return state


def hash64_rows(keys: UInt64, count: int) -> UInt64:
    """64 random bits for each of `count` positions under each key [keys, count].

    Row r is what SplitMix64 gives first when seeded with keys[r], which should themselves be hashes: the keys k and
    k + 0x9E3779B97F4A7C15 give the same row, moved by one.
    """
    state = keys[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    # `_mix` without its temporaries, which take longer than the arithmetic.
    shifted = state >> np.uint64(30)
    for factor, next_shift in ((_MIX_1, 27), (_MIX_2, 31)):
        state ^= shifted
        state *= factor
        np.right_shift(state, np.uint64(next_shift), out=shifted)
    state ^= shifted
    return state


def uniform(*coordinates: Any) -> NDArray[np.float64]:
    """A number in [0, 1) for each combination of the coordinates (53 bits)."""
    return (hash64(*coordinates) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seed_of(*coordinates: int) -> int:
    """A seed below 2**63 for a generator of another library."""
    return int(hash64(*coordinates)[0] >> np.uint64(1))


@functools.lru_cache(maxsize=1024)
def _round_keys(*key: int) -> UInt64:
    return hash64(*key, np.arange(_ROUNDS))


def permute(index: NDArray[Any], size: int, *key: int) -> NDArray[np.int64]:
    """Element `index` of a pseudo-random permutation of range(size), in constant time and memory.

    index: integers in [0, size), size at most 2**62. key: the permutation's name, such as (seed, epoch).
    """
    found = np.array(index, dtype=np.int64, ndmin=1)
    side = math.isqrt(size - 1) + 1 if size > 1 else 1
    native.load("samples").permute(
        found.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(found.size),
        ctypes.c_uint64(size),
        ctypes.c_uint64(side),
        _round_keys(*key).ctypes.data_as(ctypes.c_void_p),
    )
    return found
