"""Pictures of one run and of many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
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
    blocks = sorted({row["block"] for row in report})
    names = list(dict.fromkeys(_short_name(row) for row in report))
    with mpl.rc_context(STYLE):
        height = 0.9 + 0.28 * len(names)
        figure = Figure(
            figsize=(max(5.0, 1.8 + 0.26 * len(blocks)), 2 * height), layout="constrained"
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 1, sharex=True)
        for axis, key, title in zip(
            axes,
            ("output_error", "bits"),
            ("relative output error on the calibration text", "stored bits per weight"),
            strict=True,
        ):
            grid = np.full((len(names), len(blocks)), np.nan)
            for row in report:
                grid[names.index(_short_name(row)), blocks.index(row["block"])] = row[key]
            positive = grid[grid > 0]
            log = LogNorm() if key == "output_error" and len(positive) else None
            shown = np.where(grid > 0, grid, np.nan) if log else grid
            image = axis.imshow(shown, aspect="auto", cmap="cividis", norm=log)
            axis.set_yticks(range(len(names)), names)
            axis.set_title(title, loc="left", fontsize=9)
            axis.spines[:].set_visible(False)
            figure.colorbar(image, ax=axis, pad=0.01)
        axes[1].set_xlabel("decoder block")
        step = max(1, len(blocks) // 15)
        axes[1].set_xticks(range(0, len(blocks), step), [str(b) for b in blocks[::step]])
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
