"""The pictures of a report, as PNG and SVG."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from claq_exp.reporting.canvas import Picture, save, style
from claq_exp.reporting.collect import Measure, Run
from claq_exp.reporting.column_pictures import column_figures
from claq_exp.reporting.cost_pictures import cost_figures
from claq_exp.reporting.layer_pictures import layer_figures
from claq_exp.reporting.lines import line_labels
from claq_exp.reporting.tradeoff import tradeoff_figure

__all__ = ["Picture", "draw_report"]


def draw_report(runs: list[Run], folder: Path) -> list[Picture]:
    """Draw everything that runs have to show, and return the pictures.

    Quality over linear bits, errors of layers, widths and reserved entries of columns, time and
    memory; unfinished runs are left out.  The same runs give the same bytes.  Pictures of an
    earlier report that are none of this one's are deleted.
    """
    finished = [run for run in runs if run.results is not None]
    pictures: list[Picture] = []
    taken: set[str] = set()
    with style():
        for name, title, figure in _figures(finished):
            unique = _file_name(name, taken)
            pictures.append(save(figure, folder, unique, title))
    drawn = {picture.png for picture in pictures}
    for png in folder.glob("*.png"):
        if png not in drawn and png.with_suffix(".svg").is_file():  # a pair, as `save` leaves
            png.with_suffix(".svg").unlink()
            png.unlink()
    return pictures


def quality_measures(runs: list[Run]) -> list[Measure]:
    """Return what is drawn over bits: perplexities, KL, and the average accuracy or each task's."""
    found: dict[str, Measure] = {}
    for run in runs:
        for key, measure in run.measures.items():
            found.setdefault(key, measure)
    of_kind: dict[str, list[Measure]] = {}
    for measure in found.values():
        of_kind.setdefault(measure.kind, []).append(measure)
    accuracy = of_kind.get("average") or of_kind.get("accuracy", [])
    scores = [measure for measure in of_kind.get("score", []) if measure.better]
    return [*of_kind.get("perplexity", []), *of_kind.get("kl", []), *accuracy, *scores]


def _figures(runs: list[Run]) -> Iterator[tuple[str, str, Figure]]:
    """Yield file name, title and figure of each picture, one at a time."""
    if not runs:
        return
    labels = line_labels(runs)
    for measure in quality_measures(runs):
        title = f"{measure.label} over linear bits"
        yield f"{measure.name}_{measure.kind}", title, tradeoff_figure(runs, measure.key, labels)
    yield from layer_figures(runs)
    yield from column_figures(runs)
    yield from cost_figures(runs)


def _file_name(name: str, taken: set[str]) -> str:
    """Return a name that any file system takes and no other picture has."""
    safe = re.sub(r"[^\w.-]+", "_", name).strip("._") or "picture"
    unique, number = safe, 1
    while unique.lower() in taken:
        number += 1
        unique = f"{safe}_{number}"
    taken.add(unique.lower())
    return unique
