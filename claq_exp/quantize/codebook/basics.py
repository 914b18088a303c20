"""What compiled codebooks have in common: float16 numbers, reserved entries, nearest levels.

Compiled by numba and cached on disk.
"""

from __future__ import annotations

import numpy as np
from numba import njit

HALF_MAX = np.float32(65504.0)
HALF_OVERFLOW = np.float32(65520.0)  # midway to the next step


@njit(cache=True, nogil=True, error_model="numpy")
def round_half(value):  # type: ignore[no-untyped-def]
    """Return a float32 rounded to the nearest float16 (ties to even), infinite beyond its range."""
    magnitude = abs(value)
    if magnitude >= HALF_OVERFLOW:
        rounded = np.float32(np.inf)
    elif magnitude < np.float32(2.0**-14):  # subnormal: steps of 2**-24, the ulp of 0.5 to 1
        rounded = (magnitude + np.float32(0.75)) - np.float32(0.75)
    else:
        stretched = magnitude * np.float32(8193.0)  # 2**13 + 1 leaves 11 significant bits
        rounded = stretched - (stretched - magnitude)
    return np.copysign(rounded, value)


@njit(cache=True, nogil=True, error_model="numpy")
def _mark_largest(words, count, chosen):  # type: ignore[no-untyped-def]
    """Mark the rows of the `count` largest words, ties from the lowest row: bisection on counts."""
    low, high = np.int64(words[0]), np.int64(words[0])
    for word in words:
        low, high = min(low, np.int64(word)), max(high, np.int64(word))
    high += 1
    exactly = False
    while high - low > 1 and not exactly:  # at least `count` words reach low
        middle = (low + high) // 2
        bound = np.int32(middle)
        reached = np.int32(0)
        for word in words:
            reached += word >= bound
        exactly = reached == count
        if reached >= count:
            low = middle
        else:
            high = middle
    bound = np.int32(low)
    left = count
    for row in range(len(words)):
        if words[row] > bound:
            chosen[row] = True
            left -= 1
    for row in range(len(words)):
        if left > 0 and words[row] == bound and not chosen[row]:
            chosen[row] = True
            left -= 1


@njit(cache=True, nogil=True, error_model="numpy")
def choose_reserved(values, count, tails, chosen):  # type: ignore[no-untyped-def]
    """Mark the rows to keep: [out] float32 -> [out] bool, overwritten.

    The `count` largest magnitudes; with `tails` the count/2 largest values, rounded up, and the
    count/2 smallest.  Ties go to the lower row.
    """
    chosen[:] = False
    if count == 0:
        return
    words = np.empty(len(values), dtype=np.int32)
    bits = values.view(np.int32)
    for row in range(len(values)):  # the words of floats without sign are in their order
        words[row] = bits[row] & np.int32(0x7FFFFFFF)
    if not tails:
        _mark_largest(words, count, chosen)
        return
    for row in range(len(values)):
        words[row] = -words[row] if bits[row] < 0 else words[row]
    _mark_largest(words, (count + 1) // 2, chosen)
    if count // 2:
        for row in range(len(values)):
            words[row] = np.int32(-(1 << 31)) if chosen[row] else -words[row]
        _mark_largest(words, count // 2, chosen)


@njit(cache=True, nogil=True, error_model="numpy")
def assign_codes(values, levels, codes):  # type: ignore[no-untyped-def]
    """Write the index of the nearest level (the lower one on a tie) of each value.

    values: [n] float32.  levels: [k] float32, ascending.  codes: [n] uint8, overwritten.
    """
    half = np.float32(0.5)
    codes[:] = 0
    level = 0
    while level + 3 < len(levels):  # three borders a pass over the values
        first = half * (levels[level] + levels[level + 1])
        second = half * (levels[level + 1] + levels[level + 2])
        third = half * (levels[level + 2] + levels[level + 3])
        for index in range(len(values)):
            value = values[index]
            codes[index] += (
                np.uint8(value > first) + np.uint8(value > second) + np.uint8(value > third)
            )
        level += 3
    for last in range(level, len(levels) - 1):
        border = half * (levels[last] + levels[last + 1])
        for index in range(len(values)):
            codes[index] += np.uint8(values[index] > border)
