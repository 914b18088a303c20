"""Where a layer was not quantized as asked: what is counted, told, and refused by `strict=true`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from claq_exp.errors import NumericalError

Row = Mapping[str, Any]
ENDS = "embedding"  # in results.json: why embedding and head stay in 16 bits, where they do


@dataclass(frozen=True)
class Fallback:
    """One kind of fallback.

    key: of the count of its layers in results.json.
    column: of layers.csv, where it is seen.  happened: whether it is, in a row.
    words: what the layers did, after "3 layers".  advice: what to change.
    lossy: whether it can cost quality.
    """

    key: str
    column: str
    words: str
    happened: Callable[[Row], bool]
    advice: str = ""
    lossy: bool = True


FALLBACKS = (
    Fallback(
        "layers_indefinite",
        "nearest",
        "fell back to round-to-nearest, for no damping made the Hessian positive definite",
        lambda row: row.get("nearest") == "indefinite",
        "use more calibration tokens or a larger solver.damping",
    ),
    Fallback(
        "layers_unfed",
        "nearest",
        "got no input, or zeros only, and fell back to round-to-nearest",
        lambda row: row.get("nearest") == "unfed",
        "more calibration.windows help",
    ),
    Fallback(
        "more_damping",
        "raised_damping",
        "needed a larger damping than solver.damping",
        lambda row: row.get("raised_damping") is not None,
        "more calibration.windows help",
    ),
    Fallback(
        "layers_with_dead_columns",
        "dead_columns",
        "had inputs that were zero on every calibration token, whose columns are not compensated",
        lambda row: row["dead_columns"] > 0,
    ),
    Fallback(
        "layers_with_few_tokens",
        "tokens",
        "saw fewer calibration tokens than there are inputs",
        lambda row: row["tokens"] is not None and row["tokens"] < row["cols"],
        "more calibration.windows help",
    ),
    Fallback(
        "layers_clamped",
        "clamped",
        "had levels beyond float16, which were cut to its range",
        lambda row: bool(row.get("clamped")),
        "rescale the model's weights",
    ),
    Fallback(
        "layers_unconverged",
        "unconverged",
        "had columns whose clustering stopped at its limit of passes",
        lambda row: bool(row.get("unconverged")),
    ),
    Fallback(
        "layers_with_retreats",
        "retreats",
        "went on in smaller parts or on the CPU, for memory was short",
        lambda row: bool(row.get("retreats")),
        lossy=False,
    ),
)


def count_fallbacks(report: Iterable[Row], kept_ends: str = "") -> dict[str, Any]:
    """Return how many layers have each kind of fallback, and `layers`: how many have any.

    kept_ends: why embedding and head stay in 16 bits; a key of its own where they do.
    """
    rows = list(report)
    happened = {kind.key: sum(map(kind.happened, rows)) for kind in FALLBACKS}
    layers = sum(any(k.happened(row) for k in FALLBACKS) for row in rows)
    return {"layers": layers, **happened, **({ENDS: kept_ends} if kept_ends else {})}


def fallback_notes(counts: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each kind of fallback that happened.

    counts: as in results.json.
    """
    kept = filter(None, [counts.get(ENDS, "")])
    return [*kept, *layer_notes(counts)]


def layer_notes(counts: Mapping[str, Any]) -> list[str]:
    """Return those of layers."""
    return [
        "; ".join(
            [
                f"{count:,} {'layer' if count == 1 else 'layers'} {kind.words} "
                f"({kind.column} in layers.csv)",
                *filter(None, [kind.advice]),
            ]
        )
        for kind in FALLBACKS
        if (count := counts.get(kind.key, 0))
    ]


def reasons(row: Row) -> list[str]:
    """Return a sentence for each fallback in a row of layers.csv, with what is in its column."""
    return [
        "; ".join(
            [f"{kind.words} ({kind.column}: {row[kind.column]})", *filter(None, [kind.advice])]
        )
        for kind in FALLBACKS
        if kind.happened(row)
    ]


def refuse_fallbacks(row: Row) -> None:
    """Raise NumericalError where a row of layers.csv has a fallback that can cost quality."""
    for kind in FALLBACKS:
        if kind.lossy and kind.happened(row):
            found = f"this layer {kind.words} ({kind.column}: {row[kind.column]})"
            advice = kind.advice or "strict=false takes it and reports it"
            raise NumericalError(f"{row['name']}: strict=true, and {found}; {advice}")
