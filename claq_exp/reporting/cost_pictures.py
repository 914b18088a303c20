"""Time and memory of runs, for each device apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from claq_exp.reporting.canvas import HATCHES, add_below, new_figure, spread_out, wrapped
from claq_exp.reporting.collect import Run
from claq_exp.reporting.lines import run_labels

MOST_ROWS = 40
COLOURS = (
    "#000000",
    "#CC79A7",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#F0E442",
    "#0072B2",
    "#56B4E9",
    "#BBBBBB",
)  # Okabe and Ito, one for each stage, so that neighbours differ in lightness
OTHER = "other"
MINUTES_FROM = 300.0  # seconds of the longest run


def cost_figures(runs: Sequence[Run]) -> Iterator[tuple[str, str, Figure]]:
    """Yield bars of time, by stage, and of memory: a picture for each device."""
    devices: dict[str, list[tuple[str, Run]]] = defaultdict(list)
    for run, label in zip(runs, run_labels(runs), strict=True):
        if run.results and run.results.get("timings"):
            device = str(run.results["run"].get("device") or "unknown device")
            devices[device].append((label, run))
    for place, (device, own) in enumerate(sorted(devices.items())):
        number = f"_{place + 1}" if len(devices) > 1 else ""
        yield f"time_and_memory{number}", f"Time and memory on {device}", _figure(device, own)


def _figure(device: str, runs: Sequence[tuple[str, Run]]) -> Figure:
    chosen = spread_out(runs, MOST_ROWS)
    stages = [_stages(run) for _, run in chosen]
    longest = max(sum(own.values()) for own in stages)
    unit, divisor = ("minutes", 60.0) if longest >= MINUTES_FROM else ("seconds", 1.0)
    figure = new_figure(9.0, 1.1 + 0.24 * len(chosen))
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    left = [0.0] * len(chosen)
    handles = []
    for place, stage in enumerate(_in_order(stages)):
        values = [own.get(stage, 0.0) / divisor for own in stages]
        if not any(values):
            continue
        look: dict[str, Any] = {
            "facecolor": COLOURS[place % len(COLOURS)],
            "hatch": HATCHES[(place + place // len(COLOURS)) % len(HATCHES)],
            "edgecolor": "white",
            "linewidth": 0.3,
        }
        time.barh(range(len(chosen)), values, 0.75, left=left, **look)
        left = [start + value for start, value in zip(left, values, strict=True)]
        handles.append(Patch(label=stage, **look))
    peaks = [run.measures["memory.peak"].quantized for _, run in chosen]
    memory.barh(range(len(chosen)), [peak or 0.0 for peak in peaks], 0.75, color="#999999")
    time.set_yticks(range(len(chosen)), [wrapped(label, 3.6, 7) for label, _ in chosen], fontsize=7)
    time.set_ylim(len(chosen) - 0.4, -0.6)
    time.set_xlabel(unit)
    memory.set_xlabel("peak memory, GiB")
    for axis in (time, memory):
        axis.grid(visible=True, axis="x", linewidth=0.4, alpha=0.5)
        axis.set_axisbelow(True)
    memory.tick_params(axis="y", left=False)
    figure.suptitle(wrapped(device, 8.5), fontsize=9)
    add_below(figure, handles, _notes(len(runs), len(chosen), peaks))
    return figure


def _stages(run: Run) -> dict[str, float]:
    """Return stage -> seconds, with what the whole run took beyond them."""
    results = run.results or {}
    stages = {stage: float(seconds or 0.0) for stage, seconds in results["timings"].items()}
    total = results["run"].get("seconds")
    if total is not None:
        stages[OTHER] = max(0.0, float(total) - sum(stages.values()))
    return stages


def _in_order(runs: Sequence[Mapping[str, float]]) -> list[str]:
    """Return all stages in the order that runs have them; earlier releases had fewer."""
    known = dict.fromkeys(stage for run in sorted(runs, key=len, reverse=True) for stage in run)
    return [*(stage for stage in known if stage != OTHER), OTHER]


def _notes(runs: int, chosen: int, peaks: Sequence[float | None]) -> list[str]:
    notes = [
        "Scores of the original are shared: the run that measured them first evaluated longer."
    ]
    if unknown := sum(peak is None for peak in peaks):
        notes.append(f"The peak memory of {unknown} runs is not known.")
    if runs > chosen:
        notes.append(f"{chosen} of {runs} runs, evenly chosen by linear bits.")
    return notes
