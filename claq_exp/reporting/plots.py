"""Pictures of one run or checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize

from claq_exp.reporting.canvas import DPI, log_ticks, new_figure, short_name, style


def plot_layers(report: list[dict[str, Any]], path: Path) -> None:
    """Draw two heat maps, block x linear layer: relative output error and stored bits."""
    panels = {
        "output_error": "relative output error on the calibration text",
        "bits": "stored bits per weight",
    }
    of_blocks = [row for row in report if row["block"] is not None]
    _heat_maps(of_blocks, panels, path, {"output_error": LogNorm()})


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
    names = list(dict.fromkeys(short_name(row) for row in rows))
    with style():
        height = 0.9 + 0.28 * len(names)
        size = (max(5.0, 1.8 + 0.26 * len(blocks)), len(panels) * height)
        figure = new_figure(*size)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            grid = np.full((len(names), len(blocks)), np.nan)
            for row in rows:
                grid[names.index(short_name(row)), blocks.index(row["block"])] = row[key]
            scale = scales.get(key)
            if isinstance(scale, LogNorm):  # which has no place for a zero
                scale = scale if (grid > 0).any() else None
                grid = np.where(grid > 0, grid, np.nan) if scale else grid
            image = axis.imshow(grid, aspect="auto", cmap="cividis", norm=scale)
            axis.set_yticks(range(len(names)), names)
            axis.set_title(title, loc="left", fontsize=9)
            axis.spines[:].set_visible(False)
            bar = figure.colorbar(image, ax=axis, pad=0.01)
            if isinstance(scale, LogNorm):
                log_ticks(bar.ax.yaxis, float(np.nanmax(grid) / np.nanmin(grid)))
        axes[-1].set_xlabel("decoder block")
        step = max(1, len(blocks) // 15)
        axes[-1].set_xticks(range(0, len(blocks), step), [str(b) for b in blocks[::step]])
        figure.savefig(path, dpi=DPI)
