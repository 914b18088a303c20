"""The table and the picture of docs/results/peers.md.

    python examples/peers/table.py PICTURE_FOLDER TITLE=FOLDER ...

FOLDER is where measure_all.sh ran for one model, and TITLE names the model.  The tables are
printed, and PICTURE_FOLDER gets peers.png and peers.svg.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from measured import costs

from claq_exp.reporting.canvas import add_below, line_style, log_ticks, panel_grid, save, style

LINE = "this project, rate distortion"
FAMILIES = [LINE, "this project, other", "AutoRound", "AutoRound, alg_ext", "GPTQ", "HQQ"]
FAMILIES += ["llama.cpp"]
STORED = "linear bits per weight (everything stored)"


@dataclass(frozen=True)
class Point:
    """A checkpoint.  name: as measured.py knows it.  original: perplexity of the original."""

    name: str
    family: str
    label: str
    bits: float
    perplexity: float
    kl: float
    original: float


def points_of(folder: Path) -> list[Point]:
    """Return what the results below a folder say, in the order of their bits."""
    found = []
    for file in sorted(folder.glob("outputs/*/*/results.json")):
        results = json.loads(file.read_text())
        parts = Path(results["checkpoint"]).parts
        place = max(i for i, part in enumerate(parts) if part in ("made", "own"))
        name = parts[place + 1].removesuffix(".gguf")
        (perplexity,), (kl,) = results["perplexity"].values(), results["kl"].values()
        numbers = results["bits"]["linear"], perplexity["quantized"], kl["mean"]
        about = described(name, results.get("external"))
        found.append(Point(name, *about, *numbers, perplexity["original"]))
    return sorted(found, key=lambda point: point.bits)


def described(name: str, external: dict[str, Any] | None) -> tuple[str, str]:
    """Return family and label of a name that measure_all.sh gives."""
    parts = re.fullmatch(r"([a-z]+?)([\d.]+)(ext)?(?:-(\d+))?", name)
    if parts is None:
        return ("llama.cpp", name) if external else (FAMILIES[1], "default run")
    kind, bits, extended, iterations = parts.groups()
    if external is None:
        kinds = {"rd": (LINE, "rate distortion"), "kmeans": (FAMILIES[1], "k-means columns")}
        family, told = kinds[kind]
        return family, f"{told}, {bits} bits"
    family = {"ar": "AutoRound", "llmc": "GPTQ", "hqq": "HQQ"}[kind]
    group = f", groups of {external['group_size']}" if external["group_size"] else ""
    more = f", {iterations} iterations" if iterations else ""
    return FAMILIES[3] if extended else family, f"{bits} bits{group}{more}"


def markdown(points: list[Point], known: dict[str, dict[str, str]]) -> str:
    """Return the rows; known: what `measured.py` noted."""
    lines = ["| method | | linear bits | perplexity | KL | CPU s | peak GiB |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [f"| original | | 16.00 | {points[0].original:.2f} | | | |"]
    for p in points:
        cost = known.get(p.name, {})
        spent = f"{float(cost['cpu_seconds']):.0f} | {cost['peak_gib']}" if cost else " | "
        numbers = f"{p.bits:.2f} | {p.perplexity:.2f} | {p.kl:.3f} | {spent}"
        method = p.family.replace("this project, rate distortion", "this project")
        lines.append(f"| {method.replace(', other', '')} | {p.label} | {numbers} |")
    return "\n".join(lines)


def draw(axis: Axes, points: list[Point], measure: str) -> None:
    """Draw a measure over bits, logarithmic; llama.cpp's types are written beside their points."""
    for index, family in enumerate(FAMILIES):
        own = [p for p in points if p.family == family]
        look = line_style(index) | ({} if family == LINE else {"linestyle": ""})
        axis.plot([p.bits for p in own], [getattr(p, measure) for p in own], zorder=3, **look)
        for p in own if family == "llama.cpp" else []:
            place = p.bits, getattr(p, measure)
            axis.annotate(p.label, place, (4, 4), textcoords="offset points", fontsize=6.5)
    values = [getattr(p, measure) for p in points]
    if measure == "perplexity":
        values.append(points[0].original)
        axis.axhline(values[-1], color="#555555", linestyle=(0, (4, 2)), linewidth=1)
    axis.set_yscale("log")
    log_ticks(axis.yaxis, max(values) / min(values))
    axis.set_xlabel(STORED)
    axis.grid(visible=True, linewidth=0.4, alpha=0.5)


def main(folder: str, *models: str) -> None:
    """Print a table for each model, and draw them all."""
    found = {}
    for model in models:
        title, _, place = model.partition("=")
        found[title] = points_of(Path(place))
        print(f"## {title}\n\n{markdown(found[title], costs(Path(place)))}\n")
    with style():
        figure, axes = panel_grid(2 * len(found), 4.6, 3.4, across=2)
        for row, (title, points) in enumerate(found.items()):
            for axis, measure in zip(axes[2 * row :], ("kl", "perplexity"), strict=False):
                draw(axis, points, measure)
                told = {"kl": "KL from the original", "perplexity": "perplexity"}[measure]
                axis.set_title(f"{title}: {told}", loc="left", fontsize=9)
        used = {p.family for points in found.values() for p in points}
        looks = {family: line_style(index) for index, family in enumerate(FAMILIES)}
        handles = [
            Line2D([], [], label=f, **(look | ({} if f == LINE else {"linestyle": ""})))
            for f, look in looks.items()
            if f in used
        ]
        original = {"color": "#555555", "linestyle": (0, (4, 2)), "linewidth": 1}
        add_below(figure, [*handles, Line2D([], [], label="original model", **original)], [])
        save(figure, Path(folder), "peers", "Peers")


if __name__ == "__main__":
    main(*sys.argv[1:])
