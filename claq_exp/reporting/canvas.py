"""What all pictures of a report share: style, legend and notes below, files that do not vary."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

DPI = 150
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
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)))
HATCHES = ("", "///", "\\\\\\", "xxx", "---", "|||", "+++", "//")  # dots make SVG files large
GREY = "#8A8A8A"
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "text.parse_math": False,  # names of runs may have any letters
    "svg.hashsalt": "claq",
}
NOTE_SIZE = 7.5
LETTER = 0.062  # mean width of a letter of a legend, inches
GAP = 0.08  # inches between axes, legend and notes
Item = TypeVar("Item")


@dataclass(frozen=True)
class Picture:
    """A picture in both of its forms."""

    title: str
    png: Path
    svg: Path


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches; use it inside `style`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style() -> Any:
    """Return the context in which pictures are drawn and saved."""
    return mpl.rc_context(STYLE)


def line_style(index: int) -> dict[str, Any]:
    """Return colour, marker and dashes of the line of that number; 24 differ."""
    lap = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + lap) % len(MARKERS)],
        "linestyle": DASHES[lap % len(DASHES)],
        "linewidth": 1.2,
        "markersize": 5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.4,
    }


def add_below(figure: Figure, handles: Sequence[Artist], notes: Sequence[str]) -> None:
    """Put legend and notes below everything else, in as many columns and lines as they need."""
    width, height = figure.get_size_inches()
    top = -GAP / height
    if handles:
        for handle in handles:
            handle.set_label(wrapped(str(handle.get_label()), width - 0.5, 8))
        labels = [str(handle.get_label()) for handle in handles]
        longest = max(len(line) for label in labels for line in label.splitlines())
        columns = max(1, min(len(handles), int(width / (longest * LETTER + 0.5))))
        legend = figure.legend(
            handles=list(handles),
            loc="upper center",
            bbox_to_anchor=(0.5, top),
            ncols=columns,
            frameon=False,
            fontsize=8,
            borderaxespad=0,
            handlelength=2.6,
        )
        legend.set_in_layout(False)
        top -= _inches(figure, legend) / height + GAP / height
    letters = int(width / (LETTER * NOTE_SIZE / 8))
    lines = [line for note in notes for line in textwrap.wrap(note, letters)]
    if lines:
        figure.text(
            0.01, top, "\n".join(lines), fontsize=NOTE_SIZE, color="#444444", va="top"
        ).set_in_layout(False)


def save(figure: Figure, folder: Path, name: str, title: str) -> Picture:
    """Write NAME.png and NAME.svg; the same figure gives the same bytes."""
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter that the font lacks: a box
        figure.canvas.draw()
        figure.set_layout_engine("none")
        for artist in [*figure.legends, *figure.texts]:  # what `add_below` kept out of the layout
            artist.set_in_layout(True)
        picture = Picture(title, folder / f"{name}.png", folder / f"{name}.svg")
        common: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.08}
        figure.savefig(picture.png, dpi=DPI, metadata={"Software": None}, **common)
        figure.savefig(picture.svg, metadata={"Date": None, "Creator": None}, **common)
    return picture


def panel_grid(count: int, width: float, height: float, across: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many axes of `width` x `height` inches, `across` in a row."""
    columns = min(count, across)
    rows = -(-count // columns)
    figure = new_figure(columns * width, rows * height)
    axes = [axis for row in figure.subplots(rows, columns, squeeze=False) for axis in row]
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def log_ticks(axis: Axis, ratio: float) -> None:
    """Label a logarithmic axis with plain numbers.  ratio: largest over smallest value."""
    if ratio < 300:
        steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if ratio < 12 else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
    axis.set_minor_formatter(NullFormatter())


def plain_number(value: float) -> str:
    """Return a tick's number: without an exponent from 0.0001 to a million."""
    return f"{value:,g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.0e}"


def short_name(row: dict[str, Any]) -> str:
    """Return the layer's name inside its block."""
    _, _, inside = str(row["name"]).partition(f".{row['block']}.")
    return inside or str(row["name"])


def spread_out(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most so many items, evenly from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def wrapped(text: str, width: float, size: float = 9) -> str:
    """Return a title in lines that fit so many inches."""
    return textwrap.fill(text, max(10, int(width / (LETTER * size / 8))))


def _inches(figure: Figure, legend: Legend) -> float:
    renderer: Any = figure.canvas
    return legend.get_window_extent(renderer.get_renderer()).height / figure.dpi
