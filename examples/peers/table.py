"""The table and the picture of docs/results/peers.md.

    python examples/peers/table.py TARGET TITLE=FOLDER ...

FOLDER is where measure_all.sh ran for one model, and TITLE names the model.  TARGET gets peers.csv
and peers.png; rows of a peers.csv that is there and that were not measured again stay.  The tables
are printed.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from measured import costs

from claq_exp.reporting.canvas import add_below, line_style, log_ticks, panel_grid, save, style

LINE = "this project, rate distortion"
BEST = "this project, best without training"
OTHER = "this project, other"
OWN = {
    "rd": (LINE, "rate distortion"),
    "free": (BEST, "best"),
    "kmeans": (OTHER, "k-means columns"),
}
EXTENDED = "AutoRound, alg_ext"
PEERS = {"ar": "AutoRound", "llmc": "GPTQ of llm-compressor", "hqq": "HQQ"}
LLAMA = "llama.cpp"
FAMILIES = [LINE, BEST, OTHER, PEERS["ar"], EXTENDED, PEERS["llmc"], PEERS["hqq"], LLAMA]
STORED = "linear bits per weight (everything stored)"
ORIGINAL: Any = {"color": "#555555", "linestyle": (0, (4, 2)), "linewidth": 1}


@dataclass(frozen=True)
class Row:
    """A checkpoint.

    name: as measure_all.sh gives it.  original: perplexity of the original.  cpu_seconds, peak_gib:
    of quantizing, as words; empty where nothing is known.
    """

    model: str
    name: str
    family: str
    label: str
    bits: float
    perplexity: float
    kl: float
    original: float
    cpu_seconds: str
    peak_gib: str

    @classmethod
    def read(cls, line: dict[str, str]) -> Row:
        """Return the row that a line of peers.csv holds."""
        numbers = {key: float(line[key]) for key in ("bits", "perplexity", "kl", "original")}
        return cls(**{**line, **numbers})


def measured(title: str, folder: Path) -> list[Row]:
    """Return what the results below a folder say."""
    found, known = [], costs(folder)
    for file in sorted(folder.glob("outputs/*/*/results.json")):
        results = json.loads(file.read_text())
        parts = Path(results["checkpoint"]).parts
        place = max(i for i, part in enumerate(parts) if part in ("made", "own"))
        name = parts[place + 1].removesuffix(".gguf")
        (perplexity,), (kl,) = results["perplexity"].values(), results["kl"].values()
        numbers = results["bits"]["linear"], perplexity["quantized"], kl["mean"]
        cost = known.get(name, {})
        spent = cost.get("cpu_seconds", ""), cost.get("peak_gib", "")
        about = described(name, results.get("external"))
        found.append(Row(title, name, *about, *numbers, perplexity["original"], *spent))
    return found


def described(name: str, external: dict[str, Any] | None) -> tuple[str, str]:
    """Return family and label of a name that measure_all.sh gives."""
    parts = re.fullmatch(r"([a-z]+?)([\d.]+)(ext)?(?:-(\d+))?", name)
    if parts is None:
        return (LLAMA, name) if external else (OTHER, "default run")
    kind, bits, extended, iterations = parts.groups()
    if external is None:
        family, told = OWN[kind]
        return family, f"{told}, {bits} bits"
    group = f", groups of {external['group_size']}" if external["group_size"] else ""
    more = f", {iterations} iterations" if iterations else ""
    return EXTENDED if extended else PEERS[kind], f"{bits} bits{group}{more}"


def merged(path: Path, rows: list[Row]) -> list[Row]:
    """Return the rows and those of peers.csv that they do not replace, in the order of bits."""
    known = {(row.model, row.name): row for row in rows}
    if path.exists():
        with path.open(newline="") as file:
            old = [Row.read(line) for line in csv.DictReader(file)]
        known = {(row.model, row.name): row for row in old} | known
    models = list(dict.fromkeys(row.model for row in known.values()))
    return sorted(known.values(), key=lambda row: (models.index(row.model), row.bits))


def markdown(rows: list[Row]) -> str:
    """Return the table of one model."""
    lines = ["| method | | linear bits | perplexity | KL | CPU s | peak GiB |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [f"| original | | 16.00 | {rows[0].original:.2f} | | | |"]
    for row in rows:
        spent = f"{float(row.cpu_seconds):.0f}" if row.cpu_seconds else ""
        numbers = f"{row.bits:.2f} | {row.perplexity:.2f} | {row.kl:.3f}"
        method = "this project" if row.family in (LINE, BEST, OTHER) else row.family
        lines.append(f"| {method} | {row.label} | {numbers} | {spent} | {row.peak_gib} |")
    return "\n".join(lines)


def look(family: str) -> dict[str, Any]:
    """Return colour and marker; the points of allocations and of the best presets are joined."""
    own = line_style(FAMILIES.index(family))
    return own if family in (LINE, BEST) else own | {"linestyle": ""}


def draw(axis: Axes, rows: list[Row], measure: str) -> None:
    """Draw a measure over bits, logarithmic; beside the KL of llama.cpp's types are their names."""
    for family in FAMILIES:
        own = [row for row in rows if row.family == family]
        axis.plot([row.bits for row in own], [getattr(row, measure) for row in own], **look(family))
        for row in own if family == LLAMA and measure == "kl" else []:
            place = row.bits, row.kl
            axis.annotate(row.name, place, (4, 4), textcoords="offset points", fontsize=6.5)
    values = [getattr(row, measure) for row in rows]
    if measure == "perplexity":
        values.append(rows[0].original)
        axis.axhline(rows[0].original, **ORIGINAL)
    axis.margins(x=0.12)
    axis.set_yscale("log")
    log_ticks(axis.yaxis, max(values) / min(values))
    axis.set_xlabel(STORED)
    axis.grid(visible=True, linewidth=0.4, alpha=0.5)


def picture(target: Path, rows: list[Row]) -> None:
    """Write peers.png: a row of panels for each model, KL and perplexity."""
    models = list(dict.fromkeys(row.model for row in rows))
    with style():
        figure, axes = panel_grid(2 * len(models), 4.6, 3.4, across=2)
        panels = [(model, measure) for model in models for measure in ("kl", "perplexity")]
        for axis, (model, measure) in zip(axes, panels, strict=True):
            draw(axis, [row for row in rows if row.model == model], measure)
            told = "KL from the original" if measure == "kl" else "perplexity"
            axis.set_title(f"{model}: {told}", loc="left", fontsize=9)
        used = [family for family in FAMILIES if any(row.family == family for row in rows)]
        handles = [Line2D([], [], label=family, **look(family)) for family in used]
        add_below(figure, [*handles, Line2D([], [], label="original model", **ORIGINAL)], [])
        save(figure, target, "peers", "Peers").svg.unlink()


def main(target: str, *models: str) -> None:
    """Write peers.csv and peers.png, and print a table for each model."""
    path, found = Path(target) / "peers.csv", []
    for model in models:
        title, _, place = model.rpartition("=")
        found += measured(title, Path(place))
    rows = merged(path, found)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    for model in dict.fromkeys(row.model for row in rows):
        print(f"## {model}\n\n{markdown([row for row in rows if row.model == model])}\n")
    picture(Path(target), rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
