"""layers.csv: what became of each linear layer."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from claq_exp.system.files import write_bytes

LAYER_FIELDS = (
    "block",
    "name",
    "rows",
    "cols",
    "nominal_bits",
    "bits",
    "reserved",
    "output_error",
    "weight_error",
    "damping",
    "raised_damping",
    "dead_columns",
    "nearest",
    "clamped",
    "unconverged",
    "retreats",
    "tokens",
    "seconds",
)


def write_layers(path: Path, report: list[dict[str, Any]]) -> None:
    """Write layers.csv: one row per linear layer; what is missing is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, LAYER_FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in report:
        writer.writerow({key: "" if row[key] is None else _short(row[key]) for key in LAYER_FIELDS})
    write_bytes(path, text.getvalue().encode())


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
