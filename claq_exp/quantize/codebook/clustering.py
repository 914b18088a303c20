"""One-dimensional weighted k-means in the time of a few passes over the column.

The optimal cells of one-dimensional k-means are intervals, so that a clustering is a list of
borders in the sorted values, and a cell's squared error comes from prefix sums at its two borders.
Sorting would cost more than all the rest; instead the values fall into fine bins, whose masses and
moments are exact, and borders are sought between bins: first the best ones among few places by
dynamic programming, then joint moves by single bins.  Both are written as loops of fixed length
over neighbouring numbers, for these become vector instructions.  Compiled by numba and cached on
disk; every step is sequential, so the same input gives the same output.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit, uintp

from claq_exp.quantize.codebook.exact import NEGLIGIBLE, fit_levels_exact, write_means

BINS = 512  # up to 16 entries; more entries get more bins
MOST_BINS = 4096
SPREADS = np.float32(3.5)  # mean absolute deviations from the middle where half of the bins lie
FEWEST = 4  # up to so many filled bins per entry, a bin may hide what matters: no bins at all
PLACES = 64  # coarse places for borders; more entries than 16 get four each
WIDEST = 16  # coarse places that a cell may span
FEW = 4  # up to so many entries, a cell may span them all, and they are fewer
FEW_PLACES = 32
LONE = 4  # points at either end that are coarse places of their own: outliers
GAP = 8  # empty bins between points that count towards the distance of coarse places
REACH = 2  # strides that a border may move in either direction at once
MOVES = 2 * REACH + 1
INFEASIBLE = np.float32(1e30)
LANES = 16  # sums side by side


@njit(cache=True, nogil=True, error_model="numpy")
def _middle_spread_and_weight(values, weights):  # type: ignore[no-untyped-def]
    """Sum in lanes, in an order that the source fixes.

    Where the compiler may choose the order, it chooses another one in each place where it inlines
    this, and a process that compiles uses other places than one that loads what was compiled.
    """
    whole = len(values) // LANES * LANES
    sums, weighed = np.zeros(LANES, dtype=np.float32), np.zeros(LANES)
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            sums[lane] += values[uintp(start + lane)]
            weighed[lane] += weights[uintp(start + lane)]
    total, weight = np.float32(0.0), 0.0
    for lane in range(LANES):
        total += sums[lane]
        weight += weighed[lane]
        sums[lane] = np.float32(0.0)
    for index in range(whole, len(values)):
        total += values[index]
        weight += weights[index]
    middle = total / np.float32(len(values))
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            sums[lane] += abs(values[uintp(start + lane)] - middle)
    spread = np.float32(0.0)
    for lane in range(LANES):
        spread += sums[lane]
    for index in range(whole, len(values)):
        spread += abs(values[index] - middle)
    return middle, spread / np.float32(len(values)), weight


@njit(cache=True, nogil=True, error_model="numpy")
def bin_values(values, weights, entries):  # type: ignore[no-untyped-def]
    """Return (mass, moment, middle, bins) of the filled bins, the points of the fits below.

    values, weights: [n] float32; what has no weight is left out.
    mass, moment: [points + 1] float64 prefix sums of weight and weight * (value - middle).
    bins: [points] int64, ascending.  Bins are fine around the middle and ever wider outwards, so
    that no range need be known.
    """
    middle, spread, total = _middle_spread_and_weight(values, weights)
    count = BINS if entries <= 16 else min(32 * entries, MOST_BINS)
    scale = SPREADS * (spread if spread > 0 else np.float32(1.0))
    half = np.float32(0.5) * np.float32(count - 1)
    places = np.empty(len(values), dtype=np.int32)
    for index in range(len(values)):
        offset = values[index] - middle
        place = half * (offset / (scale + abs(offset))) + half + np.float32(0.5)
        places[index] = np.int32(place) if place >= 0.0 else np.int32(0)  # NaN needs one too
    sums = np.zeros((count, 2))
    for index in range(len(values)):
        place, weight = uintp(places[index]), np.float64(weights[index])
        sums[place, 0] += weight
        sums[place, 1] += weight * (values[index] - middle)
    bins = np.empty(count, dtype=np.int64)
    points, least = 0, NEGLIGIBLE * total
    for place in range(count):
        bins[uintp(points)] = place
        points += sums[place, 0] > least
    mass, moment = np.empty(points + 1), np.empty(points + 1)
    mass[0] = moment[0] = size = rise = 0.0
    for point in range(points):
        place = uintp(bins[point])
        size += sums[place, 0]
        rise += sums[place, 1]
        mass[point + 1], moment[point + 1] = size, rise
    return mass, moment, middle, bins[:points]


@njit(cache=True, nogil=True, error_model="numpy")
def _coarse_places(bins, most):  # type: ignore[no-untyped-def]
    """Return at most `most` + 1 ascending places for borders, the first 0 and the last all points.

    Distances are even in a mixture of points and bins: points alone would crowd in the middle of a
    short column, where nearly every value has a bin of its own, and bins alone in the empty space
    around outliers.
    """
    points = len(bins)
    reached = np.zeros(most, dtype=np.int64)  # the last point in each slot, or 0
    if points <= most:
        for point in range(points):
            reached[point] = point + 1
    else:
        distance = np.empty(points, dtype=np.int64)
        distance[0] = 0
        for point in range(1, points):
            empty = min(bins[point] - bins[point - 1] - 1, GAP)
            distance[point] = distance[point - 1] + 2 + empty
        inner = distance[points - LONE - 1] - distance[LONE]
        share = (most - 2 * LONE - 1e-6) / max(inner, 1)
        for point in range(LONE):
            reached[point] = point + 1
            reached[most - 1 - point] = points - point
        for point in range(LONE, points - LONE):
            slot = LONE + np.int64((distance[point] - distance[LONE]) * share)
            reached[uintp(slot)] = point + 1
    places = np.empty(most + 1, dtype=np.int64)
    places[0], last = 0, 0
    for slot in range(most):
        if reached[slot] > places[last]:
            last += 1
            places[last] = reached[slot]
    return places[: last + 1]


def _coarse_program(lanes: int, widest: int) -> Callable:
    """Return the dynamic program for cells of at most `widest` coarse places, `lanes` in one loop.

    Both are constants, for only then the innermost loops become vector instructions.
    """

    @njit(nogil=True, error_model="numpy")
    def merging_costs(mass, moment, square, first, costs):  # type: ignore[no-untyped-def]
        """Write the squared error of each cell beyond that of its parts, where there is a cell.

        mass, moment, square: [widest + lanes] float64, sums up to each place.  first: how many
            places come before.
        costs: [widest, lanes] float32, by width and right border.
        """
        for width in range(1, widest + 1):
            for place in range(max(width - first - 1, 0), lanes):
                right, left = uintp(place + widest), uintp(place + widest - width)
                size = mass[right] - mass[left]
                rise = moment[right] - moment[left]
                cost = square[right] - square[left] - rise * rise / size
                costs[uintp(width - 1), uintp(place)] = cost

    @njit(nogil=True, fastmath={"nnan", "nsz"}, error_model="numpy")
    def add_cell(before, costs, after):  # type: ignore[no-untyped-def]
        """Write the least cost up to each place with one more cell.

        before: [widest + lanes] float32, the least without it.  costs: [widest, lanes] float32.
        after: [lanes] float32.
        """
        for place in range(lanes):
            after[place] = INFEASIBLE
        for width in range(1, widest + 1):
            for place in range(lanes):
                cost = before[uintp(place + widest - width)] + costs[uintp(width - 1), uintp(place)]
                after[place] = min(after[place], cost)

    @njit(nogil=True, error_model="numpy")
    def best_borders(mass, moment, places, borders):  # type: ignore[no-untyped-def]
        """Write the best of the borders that lie in `places`."""
        entries, last = len(borders) - 1, len(places) - 1
        padded = (last + lanes - 1) // lanes * lanes
        # place p of `places` is at widest - 1 + p; what is before the first cannot be reached
        sums = np.empty((3, widest + padded))
        for index in range(widest):
            sums[0, index], sums[1, index], sums[2, index] = index + 1 - widest, 0.0, 0.0
        square = 0.0
        for place in range(1, last + 1):
            index, right, left = widest - 1 + place, places[place], places[place - 1]
            rise = moment[right] - moment[left]
            square += rise * rise / (mass[right] - mass[left])
            sums[0, index], sums[1, index], sums[2, index] = mass[right], moment[right], square
        for index in range(widest + last, widest + padded):
            sums[0, index], sums[1, index], sums[2, index] = mass[-1] + index, 0.0, 0.0
        scale = 1.0 / square if square > 0.0 else 1.0  # costs are float32
        for index in range(widest, widest + last):
            sums[1, index] *= np.sqrt(scale)
            sums[2, index] *= scale
        costs = np.zeros((padded // lanes, widest, lanes), dtype=np.float32)
        for part in range(len(costs)):
            lane = part * lanes
            merging_costs(sums[0, lane:], sums[1, lane:], sums[2, lane:], lane, costs[part])
        least = np.full((entries, widest + padded), INFEASIBLE, dtype=np.float32)
        for index in range(widest, widest + last):
            least[0, index] = sums[2, index] - sums[1, index] * sums[1, index] / sums[0, index]
        for cell in range(1, entries):
            for part in range(len(costs)):
                lane = part * lanes
                add_cell(least[cell - 1, lane:], costs[part], least[cell, widest + lane :])
        right = last
        borders[0], borders[entries] = 0, places[last]
        for cell in range(entries - 1, 0, -1):
            lowest, width = np.float32(np.inf), 1
            part, lane = (right - 1) // lanes, (right - 1) % lanes
            for wide in range(1, widest + 1):
                cost = least[cell - 1, widest - 1 + right - wide] + costs[part, wide - 1, lane]
                if cost < lowest:
                    lowest, width = cost, wide
            right -= width
            borders[cell] = places[right]

    return best_borders


_few_borders = _coarse_program(FEW_PLACES, FEW_PLACES)
_many_borders = _coarse_program(PLACES, WIDEST)


@njit(cache=True, nogil=True, error_model="numpy")
def _move_borders(mass, moment, borders, stride):  # type: ignore[no-untyped-def]
    """Move all inner borders at once, each by up to REACH strides.

    A dynamic program over borders x moves: unlike Lloyd's passes, which stop where no single border
    wants to move, it sees chains of borders that pay only when they move together.  A cell explains
    moment^2 / mass of the squared values, and what is explained is not left as error.
    """
    entries, points = len(borders) - 1, borders[-1]
    best = np.zeros((entries + 1, MOVES))
    gains = np.empty((entries + 1, MOVES, MOVES))
    sizes, moments = np.empty((2, MOVES)), np.empty((2, MOVES))
    for border in range(entries + 1):
        new, old = border % 2, (border + 1) % 2
        for move in range(MOVES):
            place = borders[border]
            if 0 < border < entries:
                place = min(max(place + (move - REACH) * stride, 0), points)
            sizes[new, move], moments[new, move] = mass[place], moment[place]
        if border == 0:
            continue
        for move in range(MOVES):
            top = -1.0
            for earlier in range(MOVES):
                size = sizes[new, move] - sizes[old, earlier]
                rise = moments[new, move] - moments[old, earlier]
                gain = rise * rise / max(size, 1e-300)
                gain = gain if size >= 0.0 else -np.inf
                gains[border, move, earlier] = gain
                top = max(top, best[border - 1, earlier] + gain)
            best[border, move] = top
    move = REACH
    for border in range(entries, 1, -1):
        top, origin = -1.0, REACH
        for earlier in range(MOVES):
            value = best[border - 1, earlier] + gains[border, move, earlier]
            if value > top:
                top, origin = value, earlier
        move = origin
        place = borders[border - 1] + (move - REACH) * stride
        borders[border - 1] = min(max(place, 0), points)


@njit(cache=True, nogil=True, error_model="numpy")
def fit_levels(values, weights, centroids):  # type: ignore[no-untyped-def]
    """Write ascending centroids of small weighted squared error.

    values, weights: [n] float32, finite, in any order; weights not negative.
    centroids: [entries] float64, overwritten; where there are no more distinct values than entries,
    these values themselves, the last one repeated; zeros where nothing has weight.
    """
    entries = len(centroids)
    mass, moment, middle, bins = bin_values(values, weights, entries)
    points = len(bins)
    most = FEW_PLACES if entries <= FEW else max(PLACES, 4 * entries)
    places = _coarse_places(bins, most)
    if points <= (FEWEST * entries if entries <= 16 else entries) or len(places) <= entries:
        fit_levels_exact(values, weights, centroids)  # costs little here
        return
    borders = np.empty(entries + 1, dtype=np.int64)
    if entries <= FEW:
        _few_borders(mass, moment, places, borders)
    else:
        _many_borders(mass, moment, places, borders)
    stride = max(1, points // (2 * most))
    while stride > 0:
        _move_borders(mass, moment, borders, stride)
        stride //= 2
    write_means(mass, moment, middle, borders, centroids)
