"""The search for codes and codebooks, compiled: bit for bit what `encoding.search` finds.

Compiled by numba and cached on disk.  The errors of all codebooks lie side by side, so that one
vector instruction serves them all.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uintp

WIDTH = 16  # codebooks of a padded table


@njit(cache=True, nogil=True, error_model="numpy")
def place_of(scaled, resolution, offset):  # type: ignore[no-untyped-def]
    """Return the row of a lookup table for a float32, see `table.LookupTable`."""
    limit = np.float32(offset // 2)
    steps = min(max(scaled * resolution, -limit), limit)
    return np.int32(np.floor(steps) + np.ceil(steps)) + np.int32(offset)


@njit(cache=True, nogil=True, error_model="numpy")
def _look_up(values, step, resolution, offset, scaled, places):  # type: ignore[no-untyped-def]
    """Divide an array by its step, where it has one, and write the place of each number.

    Places are rows of a lookup table, see `table.LookupTable`.
    """
    if step > np.float32(0.0):
        for index in range(len(values)):
            scaled[index] = values[index] / step
    else:
        scaled[: len(values)] = np.float32(0.0)
    for index in range(len(values)):
        places[index] = place_of(scaled[index], resolution, offset)


@njit(cache=True, nogil=True, error_model="numpy")
def _choose(scaled, places, table, errors):  # type: ignore[no-untyped-def]
    """Return the codebook with the smallest sum of squared errors, the first of equals."""
    errors[:] = np.float32(0.0)
    done = 0
    while done + 4 <= len(scaled):  # four numbers a pass; sums are from first to last all the same
        one, two, three, four = scaled[done], scaled[done + 1], scaled[done + 2], scaled[done + 3]
        words = table[uintp(places[done])]
        more = table[uintp(places[done + 1])]
        others = table[uintp(places[done + 2])]
        last = table[uintp(places[done + 3])]
        for book in range(WIDTH):
            first, second = one - words[book], two - more[book]
            third, fourth = three - others[book], four - last[book]
            error = errors[book] + first * first
            error += second * second
            error += third * third
            errors[book] = error + fourth * fourth
        done += 4
    for index in range(done, len(scaled)):
        words = table[uintp(places[index])]
        for book in range(WIDTH):
            miss = scaled[index] - words[book]
            errors[book] += miss * miss
    chosen, best = 0, errors[0]
    for book in range(1, WIDTH):
        if errors[book] < best:
            chosen, best = book, errors[book]
    return chosen


@njit(cache=True, nogil=True, error_model="numpy")
def round_rows(values, steps, table, resolution, sizes, rounded):  # type: ignore[no-untyped-def]
    """Write the nearest numbers that the format has: rounded, [rows, columns] float32.

    values: [rows, columns] float32.  steps: [rows, arrays] float32.
    table: [places, WIDTH] float32 codewords, infinite beyond the codebooks that there are.
    sizes: (offset of places, numbers of an array, numbers of a block; 0 for one codebook).
    """
    offset, array, size = sizes
    columns = values.shape[1]
    scaled, places = np.empty(array, dtype=np.float32), np.empty(array, dtype=np.int32)
    errors = np.empty(WIDTH, dtype=np.float32)
    for row in range(len(values)):
        for number in range(steps.shape[1]):
            start, stop = number * array, min((number + 1) * array, columns)
            step = steps[row, number]
            part = rounded[row, start:stop]
            mine, at = scaled[: stop - start], places[: stop - start]
            _look_up(values[row, start:stop], step, resolution, offset, mine, at)
            if size == 0:
                for index in range(len(part)):
                    part[index] = table[uintp(at[index]), 0] * step
                continue
            for first in range(0, len(part), size):
                last = min(first + size, len(part))
                book = _choose(mine[first:last], at[first:last], table, errors)
                for index in range(first, last):
                    part[index] = table[uintp(at[index]), book] * step


@njit(cache=True, nogil=True, error_model="numpy")
def encode_rows(values, steps, table, words, resolution, sizes, codes, selectors):  # type: ignore[no-untyped-def]
    """Write codes [rows, columns] and selectors [rows, blocks]; the rest as in `round_rows`.

    words: [places, codebooks] uint8, the codes of the codewords in the table.
    """
    offset, array, size = sizes
    columns = values.shape[1]
    scaled, places = np.empty(array, dtype=np.float32), np.empty(array, dtype=np.int32)
    errors = np.empty(WIDTH, dtype=np.float32)
    for row in range(len(values)):
        for number in range(steps.shape[1]):
            start, stop = number * array, min((number + 1) * array, columns)
            mine, at = scaled[: stop - start], places[: stop - start]
            _look_up(values[row, start:stop], steps[row, number], resolution, offset, mine, at)
            if size == 0:
                for index in range(stop - start):
                    codes[row, start + index] = words[uintp(at[index]), 0]
                continue
            for first in range(0, stop - start, size):
                last = min(first + size, stop - start)
                book = _choose(mine[first:last], at[first:last], table, errors)
                selectors[row, (start + first) // size] = book
                for index in range(first, last):
                    codes[row, start + index] = words[uintp(at[index]), book]
