"""Which runs make a point of a plot, and which points a line."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from claq_exp.reporting.collect import Measure, Run
from claq_exp.reporting.labels import method_label
from claq_exp.reporting.settings import flatten, is_neutral, is_seed, seedless

BUDGETS = (  # what a line runs over
    *("precision.bits", "precision.target_bits", "precision.default"),
    "allocation.target_bits",
)
SAME_METHOD = ("budget.", "precision.widths", "evaluation.", "runtime.", "device", "model.")
OF_MODEL = ("model.blocks", "model.dtype")  # what sets lines of one model apart
NAMED = 2  # settings that tell lines of one method apart, in a label


@dataclass(frozen=True)
class Point:
    """Runs that differ in nothing but seeds: mean linear bits and mean of a measure.

    value: None where it is finite in no run.  deviation: sample standard deviation, None for one.
    infinite: runs whose value is not finite, left out of the mean.
    """

    bits: float
    value: float | None
    deviation: float | None
    runs: int
    infinite: int = 0


@dataclass(frozen=True)
class Line:
    """Points of one method, by linear bits."""

    label: str
    points: list[Point]


@dataclass(frozen=True, order=True)
class Method:
    """What a line stands for: its model, its label, and the settings that it is one line by."""

    model: str
    label: str
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Panel:
    """All lines of a model.  content: what it was measured on, told where there are several."""

    model: str
    content: str
    lines: list[Line]
    originals: list[float]


def line_labels(runs: Sequence[Run]) -> dict[str, str]:
    """Return run -> label of its line: the method, and what else sets two lines of a model apart.

    A run is known here by its folder.
    """
    own = {_id(run): _method(run) for run in runs}
    labels: dict[Method, str] = {}
    for name in sorted({(method.model, method.label) for method in own.values()}):
        alike = sorted(m for m in set(own.values()) if (m.model, m.label) == name)
        settings = [dict(method.settings) for method in alike]
        keys = sorted({key for each in settings for key in each})
        keys = [key for key in keys if len({each.get(key, "unset") for each in settings}) > 1]
        taken: Counter[str] = Counter()
        for method, each in zip(alike, settings, strict=True):
            told = [f"{key}={each.get(key, 'unset')}" for key in keys[:NAMED]]
            label = ", ".join([method.label, *told, *(["…"] if len(keys) > NAMED else [])])
            taken[label] += 1
            labels[method] = f"{label} ({taken[label]})" if taken[label] > 1 else label
    return {run: labels[method] for run, method in own.items()}


def panels(runs: Sequence[Run], key: str, labels: dict[str, str]) -> list[Panel]:
    """Return a panel for each model, and for each content that its runs measured on.

    labels: as from `line_labels`.  Runs without the measure are left out.
    """
    found: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        measure = run.measures.get(key)
        if measure is not None and run.measures["bits.linear"].quantized is not None:
            found[str(run.config["model"]["name"]), measure.content].append(run)
    return [
        _panel(model, content, chosen, key, labels)
        for (model, content), chosen in sorted(_merged(found).items())
    ]


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Return a short name for each finished run: its line and its linear bits, no two alike."""
    lines = line_labels(runs)
    several = len({run.config["model"]["name"] for run in runs}) > 1
    names = []
    for run in runs:
        model = f"{run.config['model']['name']}: " if several else ""
        bits = run.measures["bits.linear"].quantized
        names.append(f"{model}{lines[_id(run)]}, {bits:.2f} bits")
    count = Counter(names)
    names = [
        f"{name}, seed {run.config.get('seed')}" if count[name] > 1 else name
        for name, run in zip(names, runs, strict=True)
    ]
    count = Counter(names)
    tails = [run.name.rpartition("-")[2] for run in runs]
    names = [f"{n}, {t}" if count[n] > 1 else n for n, t in zip(names, tails, strict=True)]
    count = Counter(names)
    return [f"{name} ({place})" if count[name] > 1 else name for place, name in enumerate(names, 1)]


def front(lines: Sequence[Line], better: str) -> list[Point]:
    """Return the points that no other beats in both bits and measure, by bits."""
    points = [p for line in lines for p in line.points if p.value is not None]
    sign = -1.0 if better == "higher" else 1.0
    best, kept = math.inf, []
    for point in sorted(points, key=lambda p: (p.bits, sign * (p.value or 0.0))):
        if sign * (point.value or 0.0) < best:
            best = sign * (point.value or 0.0)
            kept.append(point)
    return kept


def _method(run: Run) -> Method:
    settings = sorted((k, str(v)) for k, v in flatten(run.config).items() if _counts(k))
    return Method(str(run.config["model"]["name"]), method_label(run.config), tuple(settings))


def _counts(key: str) -> bool:
    if is_neutral(key) or is_seed(key) or key in BUDGETS:
        return False
    return key in OF_MODEL or not key.startswith(SAME_METHOD)


def _id(run: Run) -> str:
    return str(run.folder or run.name)


def _merged(found: dict[tuple[str, str], list[Run]]) -> dict[tuple[str, str], list[Run]]:
    """Put results that do not say the hash of their content to the only ones of that amount."""
    merged = dict(found)
    for (model, content), runs in found.items():
        amount, _, digest = content.rpartition(":")
        others = [
            other for other in found if other[0] == model and other[1].startswith(f"{amount}:")
        ]
        if not digest and len(others) == 2:
            target = next(other for other in others if other[1] != content)
            merged[target] = [*merged[target], *runs]
            del merged[model, content]
    return merged


def _panel(model: str, content: str, runs: list[Run], key: str, labels: dict[str, str]) -> Panel:
    lines: dict[str, dict[object, list[Run]]] = defaultdict(lambda: defaultdict(list))
    repeats: Counter[object] = Counter()
    for run in runs:
        seeds = [(k, v) for k, v in flatten(run.config).items() if is_seed(k)]
        draw = (seedless(run), tuple(seeds))
        repeats[draw] += 1  # the same seeds again are no other draw: a point of its own
        lines[labels[_id(run)]][seedless(run), repeats[draw]].append(run)
    own = [run.measures[key] for run in runs]
    originals = sorted({measure.original for measure in own if measure.original is not None})
    return Panel(
        model,
        content.partition(":")[0],
        [
            Line(label, sorted((_point(g, key) for g in groups.values()), key=lambda p: p.bits))
            for label, groups in sorted(lines.items())
        ],
        originals,
    )


def _point(runs: list[Run], key: str) -> Point:
    own: list[Measure] = [run.measures[key] for run in runs]
    values = [m.quantized for m in own if m.quantized is not None and math.isfinite(m.quantized)]
    return Point(
        bits=statistics.fmean(run.measures["bits.linear"].quantized or 0.0 for run in runs),
        value=statistics.fmean(values) if values else None,
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        runs=len(runs),
        infinite=len(own) - len(values),
    )
