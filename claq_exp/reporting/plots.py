"""Pictures of one run and of many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    import pandas as pd

MARKERS = "osD^vP*X"
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C6D31",
)  # Okabe and Ito, and a brown
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "claq",
}


def plot_layers(report: list[dict[str, Any]], path: Path) -> None:
    """Draw two heat maps, block x linear layer: relative output error and stored bits."""
    panels = {
        "output_error": "relative output error on the calibration text",
        "bits": "stored bits per weight",
    }
    _heat_maps(report, panels, path, {"output_error": LogNorm()})


def plot_columns(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a checkpoint, block x linear layer: stored bits, and reserved entries where it has any.

    rows: block, name, bits and reserved_percent of each layer.
    """
    panels = {"bits": "stored bits per weight"}
    if any(row["reserved_percent"] for row in rows):
        panels["reserved_percent"] = "entries reserved in 16 bits, %"
    _heat_maps(rows, panels, path, {"reserved_percent": Normalize(vmin=0)})


def _heat_maps(
    rows: list[dict[str, Any]],
    panels: dict[str, str],
    path: Path,
    scales: dict[str, Normalize],
) -> None:
    """Draw one heat map per panel (key of a row -> title), one below the other.

    scales: key -> how colours follow its values, where not from the smallest to the largest.
    """
    blocks = sorted({row["block"] for row in rows})
    names = list(dict.fromkeys(_short_name(row) for row in rows))
    with mpl.rc_context(STYLE):
        height = 0.9 + 0.28 * len(names)
        size = (max(5.0, 1.8 + 0.26 * len(blocks)), len(panels) * height)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            grid = np.full((len(names), len(blocks)), np.nan)
            for row in rows:
                grid[names.index(_short_name(row)), blocks.index(row["block"])] = row[key]
            scale = scales.get(key)
            if isinstance(scale, LogNorm):  # which has no place for a zero
                scale = scale if (grid > 0).any() else None
                grid = np.where(grid > 0, grid, np.nan) if scale else grid
            image = axis.imshow(grid, aspect="auto", cmap="cividis", norm=scale)
            axis.set_yticks(range(len(names)), names)
            axis.set_title(title, loc="left", fontsize=9)
            axis.spines[:].set_visible(False)
            figure.colorbar(image, ax=axis, pad=0.01)
        axes[-1].set_xlabel("decoder block")
        step = max(1, len(blocks) // 15)
        axes[-1].set_xticks(range(0, len(blocks), step), [str(b) for b in blocks[::step]])
        figure.savefig(path, dpi=150)


def plot_tradeoff(frame: pd.DataFrame, measure: str, original: float | None, path: Path) -> None:
    """Draw a measure over linear bits, a line per method; the original model is a dashed line.

    frame: as from `runs_frame`, with the columns `method`, `linear bits` and `measure`.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.0, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        for index, (method, rows) in enumerate(frame.groupby("method", sort=True)):
            ordered = rows.sort_values("linear bits")
            axis.plot(
                ordered["linear bits"],
                ordered[measure],
                marker=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                label=str(method),
                linewidth=1.2,
                markersize=5,
            )
        if original is not None:
            axis.axhline(original, color="#666666", linestyle="--", linewidth=1)
            axis.annotate(
                "original",
                (0.01, original),
                xycoords=("axes fraction", "data"),
                ha="left",
                va="bottom",
                color="#666666",
                fontsize=8,
            )
        if "perplexity" in measure and frame[measure].max() > 4 * frame[measure].min():
            axis.set_yscale("log", subs=[1, 1.5, 2, 3, 5, 7])
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel("linear bits per weight (everything stored)")
        axis.set_ylabel(measure)
        axis.grid(visible=True, linewidth=0.4, alpha=0.5)
        axis.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)


def _short_name(row: dict[str, Any]) -> str:
    """Return the layer's name inside its block."""
    _, _, inside = str(row["name"]).partition(f".{row['block']}.")
    return inside or str(row["name"])
