"""windows.csv: what each evaluation window adds to the perplexity and to the KL divergence."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claq_exp.errors import CheckpointError
from claq_exp.system.files import write_bytes

WINDOW_FIELDS = (
    "corpus",
    "window",
    "tokens",
    "tokens_sha256",
    "original_nll",
    "quantized_nll",
    "kl",
)


@dataclass(frozen=True)
class Windows:
    """The windows of one corpus, in order.

    contents: hash of each window's tokens.  tokens: how many of each are predicted.
    nll: sum of a window's negative log-likelihoods under the quantized model, in nats.
    kl: sum of a window's KL from the original; of the first windows only.
    """

    contents: tuple[str, ...]
    tokens: tuple[int, ...]
    nll: tuple[float, ...]
    kl: tuple[float, ...]


def write_windows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write windows.csv: a row per window, with sums in full precision; what is missing is empty.

    rows: value by each of `WINDOW_FIELDS`.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, WINDOW_FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if row[key] is None else row[key] for key in WINDOW_FIELDS})
    write_bytes(path, text.getvalue().encode())


def read_windows(path: Path) -> dict[str, Windows]:
    """Return corpus -> its windows; nothing where there is no file, as in older runs.

    Raises CheckpointError for a damaged file.
    """
    if not path.is_file():
        return {}
    found: dict[str, list[dict[str, str]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["corpus"], []).append(row)
        return {corpus: _windows(rows) for corpus, rows in found.items()}
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _windows(rows: Sequence[Mapping[str, str]]) -> Windows:
    if [int(row["window"]) for row in rows] != list(range(len(rows))):
        raise ValueError("its windows are not in order")
    return Windows(
        contents=tuple(row["tokens_sha256"] for row in rows),
        tokens=tuple(int(row["tokens"]) for row in rows),
        nll=tuple(float(row["quantized_nll"]) for row in rows),
        kl=tuple(float(row["kl"]) for row in rows if row["kl"]),
    )
