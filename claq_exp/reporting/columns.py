"""Columns of measures: which ones a table has, and that their numbers compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from claq_exp.errors import ConfigError, one_of
from claq_exp.reporting.collect import Measure, Run

BITS = ("bits.linear", "bits.nominal")  # of every table, side by side
ACTIVATION_BITS = "bits.activation"  # where any run rounds activations
SIZES = ("bits.model", "size.checkpoint")
QUALITY = ("perplexity", "kl", "accuracy", "score", "average")
GIVEN = ("bits", "size")  # follow from a budget, so that none is the best
KINDS = ("bits", "size", *QUALITY, "time", "memory")


@dataclass(frozen=True)
class Column:
    """A measure as a column; see `Measure`."""

    key: str
    label: str
    better: str
    digits: int

    @property
    def kind(self) -> str:
        """What it measures."""
        return self.key.partition(".")[0]


def known_columns(runs: Sequence[Run]) -> list[Column]:
    """Return a column for everything that any run measured, kind by kind."""
    found: dict[str, Measure] = {}
    for run in runs:
        for key, measure in run.measures.items():
            found.setdefault(key, measure)
    order = {kind: place for place, kind in enumerate(KINDS)}
    chosen = sorted(found.values(), key=lambda measure: order[measure.kind])
    return [
        Column(item.key, item.label, "" if item.kind in GIVEN else item.better, item.digits)
        for item in chosen
    ]


def choose_columns(
    runs: Sequence[Run], wanted: Sequence[str], *, sizes: bool = False
) -> list[Column]:
    """Return linear and nominal bits and the wanted measures; without a wish all of quality.

    wanted: keys or kinds; `accuracy` has the average with it.  sizes: model bits and size of the
    checkpoint too, where nothing is wanted.  Raises ConfigError for a measure that no run has.
    """
    known = {column.key: column for column in known_columns(runs)}
    chosen = [*BITS, ACTIVATION_BITS] if any(map(_rounds, runs)) else list(BITS)
    if not wanted:
        chosen += SIZES if sizes else ()
        chosen += [key for key, column in known.items() if column.kind in QUALITY]
    for word in wanted:
        kinds = ("accuracy", "average") if word == "accuracy" else (word,)
        keys = [key for key, column in known.items() if key == word or column.kind in kinds]
        if not keys:
            choices = dict.fromkeys([*(column.kind for column in known.values()), *known])
            raise ConfigError(one_of("report: measure", word, choices))
        chosen += keys
    return [known[key] for key in dict.fromkeys(chosen)]


def _rounds(run: Run) -> bool:
    bits = run.measures[ACTIVATION_BITS]
    return bits.quantized != bits.original


def check_same_content(runs: Sequence[Run], columns: Sequence[Column]) -> list[str]:
    """Refuse a column whose numbers do not compare: other tokens, other questions.

    Returns notes on what older results leave open.  Raises ConfigError.
    """
    first: dict[tuple[str, str], tuple[Run, str]] = {}
    unknown: dict[str, None] = {}
    for column in columns:
        for run in runs:
            measure = run.measures.get(column.key)
            if measure is None or not measure.content:
                continue
            model = run.config["model"]["name"]
            other, content = first.setdefault((model, column.key), (run, measure.content))
            if not same_content(measure.content, content):
                raise ConfigError(_refusal(model, measure, other, run))
            if measure.content != content:
                unknown[column.label] = None
                first[model, column.key] = (run, max(measure.content, content, key=len))
    if not unknown:
        return []
    return [
        f"Some results do not say on which content {', '.join(unknown)} was measured; only its "
        "amount is known to be the same."
    ]


def same_content(one: str, two: str) -> bool:
    """Tell whether two contents of measures agree in amount, and in hash where both have one."""
    amount, _, hash_ = one.rpartition(":")
    other_amount, _, other_hash = two.rpartition(":")
    return amount == other_amount and (not hash_ or not other_hash or hash_ == other_hash)


def _refusal(model: str, measure: Measure, one: Run, other: Run) -> str:
    where = f"({one.name}, {other.name})"
    advice = f"put them in separate folders, or leave {measure.key} out with --metrics"
    if measure.kind in ("perplexity", "kl"):
        what = (
            f"'{measure.name}'" if measure.kind == "perplexity" else f"the KL on '{measure.name}'"
        )
        return f"report: runs of {model} measured {what} on different tokens {where}; {advice}"
    if measure.kind == "average":
        return f"report: runs of {model} averaged accuracy over different tasks {where}; {advice}"
    return (
        f"report: runs of {model} scored '{measure.name}' on different questions (rows, prompts, "
        f"data or metric) {where}; {advice}"
    )
