"""Random numbers as pure functions of their coordinates: nothing to save, any one can be jumped to.

`hash64` is the finalizer of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"),
chained over the coordinates. `permute` is a keyed bijection: a balanced Feistel network (Luby & Rackoff 1988) over the
next power of four, walked along its cycle until it falls into range (Black & Rogaway 2002, "Ciphers with arbitrary
finite domains"). Both take arrays.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for coordinate in coordinates:
            state = _mix((state + _GOLDEN) ^ (np.asarray(coordinate).astype(np.uint64) * _GOLDEN))
    return state


def uniform(*coordinates: Any) -> NDArray[np.float64]:
    """A number in [0, 1) for each combination of the coordinates (53 bits)."""
    return (hash64(*coordinates) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seed_of(*coordinates: int) -> int:
    """A seed below 2**63 for a generator of another library."""
    return int(hash64(*coordinates)[0] >> np.uint64(1))


def permute(index: NDArray[Any], size: int, *key: int) -> NDArray[np.int64]:
    """Element `index` of a pseudo-random permutation of range(size), in constant time and memory.

    index: integers in [0, size). key: the permutation's name, such as (seed, epoch).
    """
    half_bits = np.uint64(max(1, -(-max(size - 1, 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = [hash64(*key, round_number) for round_number in range(_ROUNDS)]

    def encrypt(value: UInt64) -> UInt64:
        left, right = value >> half_bits, value & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        return (left << half_bits) | right

    with np.errstate(over="ignore"):
        value = encrypt(np.atleast_1d(np.asarray(index)).astype(np.uint64))
        while (outside := value >= np.uint64(size)).any():
            value[outside] = encrypt(value[outside])
    return value.astype(np.int64)
