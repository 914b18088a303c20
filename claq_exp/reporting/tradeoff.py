"""A measure over linear bits, a line per method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from claq_exp.reporting.canvas import (
    GREY,
    add_below,
    line_style,
    log_ticks,
    panel_grid,
    wrapped,
)
from claq_exp.reporting.collect import Measure, Run
from claq_exp.reporting.lines import Line, Panel, front, panels

MOST_LINES = 16  # in colour; the others are grey dots
MOST_PANELS = 9
LOG_FROM = 4.0  # largest over smallest value
FRONT: Any = {"color": "#CBCBCB", "linewidth": 3, "solid_capstyle": "round", "zorder": 0.5}
ORIGINAL: Any = {"color": "#555555", "linestyle": (0, (4, 2)), "linewidth": 1, "zorder": 1}


def tradeoff_figure(runs: Sequence[Run], key: str, labels: dict[str, str]) -> Figure:
    """Draw a measure over linear bits: a panel per model, a line per method, the Pareto front.

    runs: of which at least one has the measure.  labels: run -> line, as from `line_labels`.
    """
    measure = next(run.measures[key] for run in runs if key in run.measures)
    all_panels = panels(runs, key, labels)
    shown = all_panels[:MOST_PANELS]
    single = len(shown) == 1
    size = (6.4, 3.9) if single else (4.3, 3.3)
    figure, axes = panel_grid(len(shown), *size, across=2 if len(shown) in (2, 4) else 3)
    styles = _styles(shown, measure, sorted(set(labels.values())))
    several = len({panel.model for panel in shown}) < len(shown)
    for axis, panel in zip(axes, shown, strict=True):
        _draw(axis, panel, measure, styles)
        title = f"{panel.model}, {_amount(panel, measure)}" if several else panel.model
        axis.set_title(wrapped(title, size[0] - 1), loc="left", fontsize=9)
    notes = _notes(runs, key, shown)
    if several:
        notes.append("Other texts, tasks or amounts of them have a panel of their own.")
    if len(all_panels) > len(shown):
        left = ", ".join(panel.model for panel in all_panels[MOST_PANELS:])
        notes.append(f"Not shown for lack of room: {left}.")
    if grey := [label for label, own in styles.items() if own is None]:
        notes.append(f"Grey dots: {len(grey)} further methods, each with few points.")
    add_below(figure, _handles(shown, measure, styles), notes)
    return figure


def _amount(panel: Panel, measure: Measure) -> str:
    counted = measure.kind in ("perplexity", "kl") and panel.content.isdecimal()
    return f"{int(panel.content):,} tokens" if counted else panel.content


def _styles(
    shown: Sequence[Panel], measure: Measure, known: list[str]
) -> dict[str, dict[str, Any] | None]:
    """Return line -> style, None for the grey ones: off the front and of fewest points."""
    points: dict[str, int] = {}
    leading: dict[str, int] = {}
    for panel in shown:
        best = {id(point) for point in front(panel.lines, measure.better)}
        for line in panel.lines:
            points[line.label] = points.get(line.label, 0) + len(line.points)
            on_front = sum(id(point) in best for point in line.points)
            leading[line.label] = leading.get(line.label, 0) + on_front
    if len(known) <= MOST_LINES:  # the same line looks the same in all pictures
        return {label: line_style(known.index(label)) for label in sorted(points)}
    ranked = sorted(points, key=lambda label: (-leading[label], -points[label], label))
    chosen = sorted(ranked[:MOST_LINES])
    return {
        label: line_style(chosen.index(label)) if label in chosen else None
        for label in sorted(points)
    }


def _draw(
    axis: Axes, panel: Panel, measure: Measure, styles: dict[str, dict[str, Any] | None]
) -> None:
    best = front(panel.lines, measure.better)
    if len(best) > 1:
        bits, values = [p.bits for p in best], [p.value or 0.0 for p in best]
        axis.plot(bits, values, drawstyle="steps-post", **FRONT)
    for line in sorted(panel.lines, key=lambda line: styles[line.label] is not None):
        _draw_line(axis, line, styles[line.label], measure)
    values = [p.value for line in panel.lines for p in line.points if p.value is not None]
    logarithmic = _is_logarithmic(panel, measure)
    if logarithmic:
        axis.set_yscale("log")
    for original in panel.originals[:1]:
        if original > 0 or not logarithmic:
            axis.axhline(original, **ORIGINAL)
            axis.update_datalim([(0.0, original)], updatex=False)  # a margin for this line too
            axis.autoscale_view()
            values.append(original)
    if logarithmic:
        log_ticks(axis.yaxis, max(values) / min(values))
    axis.set_xlabel("linear bits per weight (everything stored)")
    axis.set_ylabel(measure.label)
    axis.grid(visible=True, linewidth=0.4, alpha=0.5)


def _is_logarithmic(panel: Panel, measure: Measure) -> bool:
    values = [p.value for line in panel.lines for p in line.points if p.value is not None]
    if measure.better != "lower" or not values or min(values) <= 0:
        return False
    values += [value for value in panel.originals if value > 0]
    return max(values) > LOG_FROM * min(values)


def _draw_line(axis: Axes, line: Line, own: dict[str, Any] | None, measure: Measure) -> None:
    style = own or {"color": GREY, "marker": ".", "linestyle": "", "markersize": 5}
    bits = [point.bits for point in line.points]
    values = [math.nan if point.value is None else point.value for point in line.points]
    axis.plot(bits, values, zorder=3 if own else 2, **style)
    spread = [point for point in line.points if point.deviation is not None]
    if spread:
        axis.errorbar(
            [point.bits for point in spread],
            [point.value or 0.0 for point in spread],
            yerr=[point.deviation or 0.0 for point in spread],
            fmt="none",
            ecolor=style["color"],
            elinewidth=1,
            capsize=2.5,
            zorder=2.5,
        )
    edge = 0.02 if measure.better == "higher" else 0.98
    for point in line.points:
        if point.value is None:  # at the edge where a worse value would be
            axis.plot(
                [point.bits],
                [edge],
                marker="x",
                markersize=6,
                color=style["color"],
                transform=axis.get_xaxis_transform(),
                zorder=4,
            )


def _handles(
    shown: Sequence[Panel], measure: Measure, styles: dict[str, dict[str, Any] | None]
) -> list[Line2D]:
    handles = [
        Line2D([], [], label=label, **own) for label, own in styles.items() if own is not None
    ]
    if any(own is None for own in styles.values()):
        handles.append(Line2D([], [], color=GREY, marker=".", linestyle="", label="other methods"))
    if any(len(front(panel.lines, measure.better)) > 1 for panel in shown):
        handles.append(Line2D([], [], label="Pareto front", **FRONT))
    values = {
        panel.originals[0]
        for panel in shown
        if panel.originals and (panel.originals[0] > 0 or not _is_logarithmic(panel, measure))
    }
    if values:  # a zero has no place on a logarithmic axis
        told = f" ({next(iter(values)):.{measure.digits}f})" if len(values) == 1 else ""
        handles.append(Line2D([], [], label=f"original model{told}", **ORIGINAL))
    if any(p.value is None for panel in shown for line in panel.lines for p in line.points):
        cross: Any = {"color": "#555555", "marker": "x", "linestyle": "", "markersize": 6}
        handles.append(Line2D([], [], label="not finite", **cross))
    return handles


def _notes(runs: Sequence[Run], key: str, shown: Sequence[Panel]) -> list[str]:
    notes = []
    points = [point for panel in shown for line in panel.lines for point in line.points]
    seeds = sorted({point.runs - point.infinite for point in points if point.deviation is not None})
    if seeds:
        count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        notes.append(f"Bars: sample standard deviation over seeds (n = {count}); dots: the mean.")
    infinite = sum(point.infinite for point in points)
    if infinite:
        notes.append(f"{infinite} of {sum(p.runs for p in points)} values are not finite.")
    missing = sum(key not in run.measures for run in runs)
    if missing:
        notes.append(f"{missing} of {len(runs)} finished runs did not measure it.")
    for panel in shown:
        low, high = (panel.originals[0], panel.originals[-1]) if panel.originals else (0.0, 0.0)
        digits = next(run for run in runs if key in run.measures).measures[key].digits
        if f"{low:.{digits}f}" != f"{high:.{digits}f}":
            notes.append(
                f"Runs measured the original {panel.model} at {low:.{digits}f} to "
                f"{high:.{digits}f}; the line is the lowest."
            )
    errors = [m.stderr for run in runs if (m := run.measures.get(key)) and m.stderr]
    if errors:
        notes.append(f"Standard error over the task's rows: up to {max(errors):.1f} points.")
    return notes
