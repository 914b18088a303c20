"""How many columns have which width, and how many reserved entries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from claq_exp.checkpoint.reader import read_layouts
from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.models.ends import in_blocks
from claq_exp.payload.packing import unpack
from claq_exp.reporting.canvas import (
    COLOURS,
    HATCHES,
    add_below,
    new_figure,
    spread_out,
    wrapped,
)
from claq_exp.reporting.collect import Run
from claq_exp.reporting.lines import run_labels
from claq_exp.tensor_files.shards import open_tensors

MOST_BARS = 8  # runs side by side; with more, one stacked bar each
MOST_ROWS = 40


@dataclass(frozen=True)
class Columns:
    """Columns of all matrices of blocks: how many of each width, and with each reserved count."""

    widths: Mapping[int, int]
    reserved: Mapping[int, int]


def read_columns(checkpoint: Path) -> Columns:
    """Count the columns of a checkpoint; reads the headers and the reserved counts alone.

    Raises ConfigError for a folder that is no checkpoint, CheckpointError for a damaged one.
    """
    layouts = in_blocks(read_layouts(checkpoint))
    widths: Counter[int] = Counter()
    reserved: Counter[int] = Counter()
    with open_tensors(checkpoint) as get:
        for name, layout in layouts.items():
            widths.update(layout.widths())
            if not layout.reserved:
                reserved[0] += layout.columns
                continue
            packed = get(f"{name}.reserved_counts")
            if tuple(packed.shape) != layout.stored_tensors()["reserved_counts"].shape:
                raise CheckpointError(f"{checkpoint}: {name}.reserved_counts has another shape")
            counts = unpack(packed, layout.most_reserved.bit_length(), layout.columns)
            reserved.update(dict(enumerate(torch.bincount(counts).tolist())))
    return Columns(dict(sorted(widths.items())), dict(sorted((+reserved).items())))


def column_figures(runs: Sequence[Run]) -> Iterator[tuple[str, str, Figure]]:
    """Yield the histograms of widths and, where there are any, of reserved entries."""
    found: list[tuple[str, Columns]] = []
    for run, label in zip(runs, run_labels(runs), strict=True):
        try:
            found.append((label, read_columns((run.folder or Path()) / "checkpoint")))
        except (ConfigError, CheckpointError):  # deleted to save room, or damaged: the note counts
            continue
    if not found:
        return
    gone = len(runs) - len(found)
    notes = [f"{gone} of {len(runs)} runs have no readable checkpoint left."] if gone else []
    widths = {label: {f"{w} bits": n for w, n in own.widths.items()} for label, own in found}
    order = sorted({w for _, own in found for w in own.widths})
    yield (
        "column_bits",
        "Columns of each width",
        _shares(widths, [f"{width} bits" for width in order], "width of a column's codes", notes),
    )
    reserving = [(label, own) for label, own in found if set(own.reserved) - {0}]
    if not reserving:
        return
    if len(reserving) < len(found):
        notes = [*notes, f"{len(found) - len(reserving)} runs reserve nothing and are not shown."]
    most = max(count for _, own in reserving for count in own.reserved)
    bins = _bins(most)
    entries = {label: _binned(own.reserved, bins) for label, own in reserving}
    yield (
        "reserved_per_column",
        "Reserved entries per column",
        _shares(entries, [_bin_name(*b) for b in bins], "reserved entries in a column", notes),
    )


def _bins(most: int) -> list[tuple[int, int]]:
    """Return first and last of 0, 1, 2, 3-4, 5-8, 9-16 and so on."""
    bins = [(0, 0), (1, 1)]
    while bins[-1][1] < most:
        bins.append((bins[-1][1] + 1, 2 * bins[-1][1]))
    return bins


def _bin_name(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _binned(counts: Mapping[int, int], bins: Sequence[tuple[int, int]]) -> dict[str, int]:
    return {
        _bin_name(first, last): sum(n for k, n in counts.items() if first <= k <= last)
        for first, last in bins
    }


def _shares(
    counts: Mapping[str, Mapping[str, int]],
    order: Sequence[str],
    meaning: str,
    notes: Sequence[str],
) -> Figure:
    """Draw run -> share of each kind: bars side by side for a few runs, else a stacked one each."""
    shares = {
        run: [100 * own.get(kind, 0) / sum(own.values()) for kind in order]
        for run, own in counts.items()
    }
    if len(shares) <= MOST_BARS:
        return _grouped(shares, order, meaning, notes)
    return _stacked(shares, order, meaning, notes)


def _grouped(
    shares: Mapping[str, Sequence[float]], order: Sequence[str], meaning: str, notes: Sequence[str]
) -> Figure:
    figure = new_figure(max(5.0, min(9.0, 1.5 + 0.16 * len(order) * (len(shares) + 1))), 3.2)
    axis = figure.subplots()
    width = 0.84 / len(shares)
    handles = []
    for place, (run, values) in enumerate(shares.items()):
        look: dict[str, Any] = {
            "facecolor": COLOURS[place % len(COLOURS)],
            "hatch": HATCHES[place % len(HATCHES)],
            "edgecolor": "white",
            "linewidth": 0.4,
        }
        left = [kind + (place - (len(shares) - 1) / 2) * width for kind in range(len(order))]
        axis.bar(left, values, width, **look)
        handles.append(Patch(label=run, **look))
    axis.set_xticks(range(len(order)), order)
    axis.set_xlabel(meaning)
    axis.set_ylabel("share of all columns, %")
    axis.grid(visible=True, axis="y", linewidth=0.4, alpha=0.5)
    axis.set_axisbelow(True)
    add_below(figure, handles, notes)
    return figure


def _stacked(
    shares: Mapping[str, Sequence[float]], order: Sequence[str], meaning: str, notes: Sequence[str]
) -> Figure:
    chosen = spread_out(list(shares), MOST_ROWS)
    figure = new_figure(8.5, 1.0 + 0.2 * len(chosen))
    axis = figure.subplots()
    colours = colormaps["cividis"]
    handles = []
    left = [0.0] * len(chosen)
    for place, kind in enumerate(order):
        look: dict[str, Any] = {
            "facecolor": colours(place / max(1, len(order) - 1)),
            "hatch": HATCHES[place % 4],
            "edgecolor": "white",
            "linewidth": 0.4,
        }
        values = [shares[run][place] for run in chosen]
        axis.barh(range(len(chosen)), values, 0.8, left=left, **look)
        left = [start + value for start, value in zip(left, values, strict=True)]
        handles.append(Patch(label=kind, **look))
    axis.set_yticks(range(len(chosen)), [wrapped(run, 4.5, 7) for run in chosen], fontsize=7)
    axis.set_ylim(len(chosen) - 0.4, -0.6)
    axis.set_xlim(0, 100)
    axis.set_xlabel(f"share of all columns, %, by {meaning}")
    if len(shares) > len(chosen):
        notes = [*notes, f"{len(chosen)} of {len(shares)} runs, evenly chosen by linear bits."]
    add_below(figure, handles, notes)
    return figure
