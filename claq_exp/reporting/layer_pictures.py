"""Errors and bits of every layer, runs side by side."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from claq_exp.reporting.canvas import (
    add_below,
    line_style,
    log_ticks,
    new_figure,
    panel_grid,
    short_name,
    spread_out,
    wrapped,
)
from claq_exp.reporting.collect import Run
from claq_exp.reporting.lines import run_labels

MOST_LINES = 8
MOST_MAPS = 6
MOST_MODELS = 4
MOST_NAMES = 24  # linear layers of a block; with more, those that differ in numbers are one row
MEASURES = {"output_error": "relative output error", "bits": "stored bits per weight"}


@dataclass(frozen=True)
class Layered:
    """A run with its layers.  values: measure -> (block, layer inside the block) -> mean."""

    label: str
    values: dict[str, dict[tuple[int, str], float]]


def layer_figures(runs: Sequence[Run]) -> Iterator[tuple[str, str, Figure]]:
    """Yield, for each model: errors over blocks with a line per run, then maps of a few runs."""
    models: dict[str, list[Layered]] = defaultdict(list)
    for run, label in zip(runs, run_labels(runs), strict=True):
        if rows := run.block_layers:
            model = str(run.config["model"]["name"])
            models[model].append(Layered(label.removeprefix(f"{model}: "), _values(rows)))
    for model, own in list(models.items())[:MOST_MODELS]:
        if any(run.values["output_error"] for run in own):
            title = f"Output error by block, {model}"
            yield f"errors_by_block_{model}", title, _lines_figure(model, own)
        for key, label in MEASURES.items():
            drawn = [run for run in own if run.values[key]]
            if drawn:
                title = f"{label.capitalize()} of every layer, {model}"
                yield f"layers_{key}_{model}", title, _maps_figure(model, drawn, key, label)


def _values(rows: Sequence[dict[str, Any]]) -> dict[str, dict[tuple[int, str], float]]:
    names = {short_name(row) for row in rows}
    merge = len(names) > MOST_NAMES  # experts of a mixture
    found: dict[str, dict[tuple[int, str], list[float]]] = {
        key: defaultdict(list) for key in MEASURES
    }
    for row in rows:
        name = short_name(row)
        place = (int(row["block"]), re.sub(r"(?<=\.)\d+(?=\.)", "*", name) if merge else name)
        for key in MEASURES:
            value = row.get(key)
            if isinstance(value, (int, float)) and math.isfinite(value):
                found[key][place].append(float(value))
    return {
        key: {place: statistics.fmean(values) for place, values in places.items()}
        for key, places in found.items()
    }


def _lines_figure(model: str, runs: Sequence[Layered]) -> Figure:
    drawn = [run for run in runs if run.values["output_error"]]
    chosen = spread_out(drawn, MOST_LINES)
    figure = new_figure(6.8, 3.6)
    axis = figure.subplots()
    handles = []
    means: list[float] = []
    for run in drawn:
        by_block: dict[int, list[float]] = defaultdict(list)
        for (block, _), value in run.values["output_error"].items():
            by_block[block].append(value)
        blocks = sorted(by_block)
        own = [statistics.fmean(by_block[block]) for block in blocks]
        means += own
        if run in chosen:
            look = line_style(chosen.index(run)) | {"markersize": 4}
            handles.append(Line2D([], [], label=run.label, **look))
        else:
            look = {"color": "#CFCFCF", "linewidth": 0.8}
        axis.plot(blocks, own, zorder=3 if run in chosen else 1, **look)
    if len(drawn) > len(chosen):
        left = len(drawn) - len(chosen)
        handles.append(Line2D([], [], color="#CFCFCF", label=f"{left} other runs"))
    if min(means) > 0:
        axis.set_yscale("log")
        log_ticks(axis.yaxis, max(means) / min(means))
    axis.set_title(wrapped(model, 6), loc="left", fontsize=9)
    axis.set_xlabel("decoder block")
    axis.set_ylabel("relative output error,\nmean of the block's layers")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(visible=True, linewidth=0.4, alpha=0.5)
    add_below(figure, handles, _left_out(len(drawn), len(chosen)))
    return figure


def _maps_figure(model: str, runs: Sequence[Layered], key: str, label: str) -> Figure:
    """Draw heat maps, block x linear layer, of a few runs in the same colours."""
    chosen = spread_out(runs, MOST_MAPS)
    blocks = sorted({block for run in chosen for block, _ in run.values[key]})
    names = list(dict.fromkeys(name for run in chosen for _, name in run.values[key]))
    across = 1 if len(chosen) == 1 else 2
    width = min(9.0, max(4.6, 1.5 + 0.1 * len(blocks)))
    height = max(0.75 + 0.19 * len(names), 2.4 / -(-len(chosen) // across))  # of the bar's words
    figure, axes = panel_grid(len(chosen), width, height, across)
    norm = _norm([value for run in chosen for value in run.values[key].values()], key)
    for place, (axis, run) in enumerate(zip(axes, chosen, strict=True)):
        grid = np.full((len(names), len(blocks)), np.nan)
        for (block, name), value in run.values[key].items():
            grid[names.index(name), blocks.index(block)] = value
        if isinstance(norm, LogNorm):
            grid[grid <= 0] = np.nan
        image = axis.imshow(grid, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
        axis.set_facecolor("#E6E6E6")  # of a layer without a value
        axis.set_yticks(range(len(names)), names if place % across == 0 else [], fontsize=7.5)
        axis.set_title(wrapped(run.label, width - 1.2, 8), fontsize=8)
        axis.spines[:].set_visible(False)
        step = max(1, len(blocks) // 8)
        axis.set_xticks(range(0, len(blocks), step), [str(b) for b in blocks[::step]])
        if place >= len(chosen) - across:
            axis.set_xlabel("decoder block")
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30)
    bar.set_label(label)
    if isinstance(norm, LogNorm):
        log_ticks(bar.ax.yaxis, (norm.vmax or 1.0) / (norm.vmin or 1.0))
    figure.suptitle(wrapped(model, width), fontsize=9)
    notes = _left_out(len(runs), len(chosen))
    if any("*" in name for name in names):
        notes.append("A star stands for any number: the mean over layers such as experts.")
    add_below(figure, [], notes)
    return figure


def _norm(values: Sequence[float], key: str) -> Normalize:
    positive = [value for value in values if value > 0]
    if key == "output_error" and positive and max(positive) > min(positive):
        return LogNorm(min(positive), max(positive))
    return Normalize(min(values), max(values) if max(values) > min(values) else min(values) + 1)


def _left_out(runs: int, chosen: int) -> list[str]:
    if runs == chosen:
        return []
    return [f"{chosen} of {runs} runs, evenly chosen from the fewest to the most linear bits."]
