"""The order of an epoch's samples: a permutation of (seed, epoch), computed where it is read.

Version 1 sorts all indices by a 64-bit hash. Version 2 does so up to ``SHUFFLED`` samples. Beyond,
it is a Feistel network on the smallest power of two that holds the data set: of an index, each half
in turn is XORed with a hash of the other half and a round key. Outputs outside the data set are fed
in again until they are inside (cycle walking; Black and Rogaway 2002, less than twice on average).
So any position costs the same, memory does not grow with the data set, and nothing is done before
the first index.

All is unsigned integer arithmetic that wraps, with constants that are written here: an order must
not depend on a library's version, nor on the platform. Keys and version 1 use Steele, Lea and
Flood's SplitMix64 (2014), the rounds multiply by Wellons's constants (lowbias32, 2018).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

SHUFFLED: Final = 4096
"""Samples up to which the order is a sort in each version: a network on so few would repeat itself
from epoch to epoch, and the sort takes a fraction of a millisecond."""

ROUNDS: Final = 8

_Indices: TypeAlias = NDArray[np.uint64]
_Half: TypeAlias = NDArray[np.uint32]

_MASK: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
_ROUND_FIRST: Final = np.uint32(0x7FEB352D)
_ROUND_SECOND: Final = np.uint32(0x846CA68B)
_HALF_BITS: Final = 32


class Order:
    """The order of one epoch.

    Args:
        size: samples of the data set, 1 to 2**63 - 1.
        seed: of the permutation; None for the data set's own order.
        version: 1 or 2.
    """

    def __init__(self, size: int, seed: int | None, epoch: int, version: int) -> None:
        self._size = size
        self._is_shuffled = seed is not None
        self._is_sorted = version == 1 or size <= SHUFFLED
        self._key = _mix_number(_mix_number((seed or 0) & _MASK) ^ (epoch & _MASK))
        bits = (size - 1).bit_length()
        self._right_bits = bits // 2
        self._left_bits = bits - self._right_bits

    def samples(self, begin: int, stride: int, count: int) -> _Indices:
        """Return the samples at ``count`` positions from ``begin``, ``stride`` apart; positions
        beyond the end count from the start again."""
        positions = np.arange(count, dtype=np.uint64)
        positions *= np.uint64(stride)
        positions += np.uint64(begin)
        if begin + (count - 1) * stride >= self._size:
            positions %= np.uint64(self._size)
        if not self._is_shuffled:
            return positions
        return self._table[positions] if self._is_sorted else self._walk(positions)

    @cached_property
    def _table(self) -> _Indices:
        hashes = np.arange(1, self._size + 1, dtype=np.uint64)
        hashes *= np.uint64(_GOLDEN)
        hashes += np.uint64(self._key)
        _mix(hashes)
        return np.argsort(hashes.view(np.int64)).view(np.uint64)  # no two hashes are equal

    def _walk(self, positions: _Indices) -> _Indices:
        found, size = self._permute(positions), np.uint64(self._size)
        outside = np.flatnonzero(found >= size)
        while outside.size:
            again = self._permute(found[outside])
            found[outside] = again
            outside = outside[again >= size]
        return found

    def _permute(self, values: _Indices) -> _Indices:
        """Return a permutation of all numbers of ``_left_bits + _right_bits`` bits, at these."""
        shift = np.uint64(self._right_bits)
        left = (values >> shift).astype(np.uint32)
        right = (values & np.uint64((1 << self._right_bits) - 1)).astype(np.uint32)
        room = np.empty_like(left), np.empty_like(left)
        for turn in range(0, ROUNDS, 2):
            _round(left, right, self._keys[turn], self._left_bits, *room)
            _round(right, left, self._keys[turn + 1], self._right_bits, *room)
        found = left.astype(np.uint64)
        found <<= shift
        found |= right
        return found

    @cached_property
    def _keys(self) -> list[Any]:
        numbers = [_mix_number(self._key + turn * _GOLDEN) for turn in range(ROUNDS)]
        return [np.uint32(number >> 32) for number in numbers]


def _round(half: _Half, other: _Half, key: Any, bits: int, hashed: _Half, shifted: _Half) -> None:
    """XOR the upper ``bits`` bits of a hash of ``other`` into ``half``."""
    np.add(other, key, out=hashed)
    np.multiply(hashed, _ROUND_FIRST, out=hashed)
    np.right_shift(hashed, np.uint32(15), out=shifted)
    np.bitwise_xor(hashed, shifted, out=hashed)
    np.multiply(hashed, _ROUND_SECOND, out=hashed)
    np.right_shift(hashed, np.uint32(_HALF_BITS - bits), out=hashed)
    np.bitwise_xor(half, hashed, out=half)


def _mix(values: _Indices) -> None:
    """Apply SplitMix64's finalizer in place."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(_FIRST)
    values ^= values >> np.uint64(27)
    values *= np.uint64(_SECOND)
    values ^= values >> np.uint64(31)


def _mix_number(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)
