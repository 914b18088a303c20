"""What a person reads while a model is quantized: a line for each block, and for each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

from claq_exp.checkpoint.writer import Sizes
from claq_exp.run.stages import QUANTIZE_TIMINGS
from claq_exp.run_folder.fallbacks import reasons

Row = Mapping[str, Any]
GIB = 2**30
WRAPPED: Any = {"width": 79, "initial_indent": 4 * " ", "subsequent_indent": 6 * " "}


def event_lines(
    event: str,
    data: Mapping[str, Any],
    report: Callable[[], Sequence[Row]],
    blocks: int,
    *,
    peak: int,
    verbose: bool,
) -> Iterator[str]:
    """Yield what a person reads of an event of a quantization; see `Watcher`.

    report: returns all rows of layers.csv so far.  blocks: of the model.  peak: bytes of memory,
    where the event does not say.  verbose: with a line for each tensor.
    """
    if event == "layer" and verbose:
        yield from layer_lines(data)
    if event not in ("block", "stage"):
        return
    block, name = data.get("block"), data.get("name")  # embedding and head have names, no block
    place = data["end"] if block is None else f"block {block + 1}/{blocks}"
    rows = [row for row in report() if row["block"] == block and name in (None, row["name"])]
    seconds = sum(data[kind] for kind in QUANTIZE_TIMINGS if kind in data)
    yield block_line(place, rows, seconds, data.get("peak_memory_bytes", peak))


def block_line(place: str, rows: Sequence[Row], seconds: float, peak: int) -> str:
    """Return what came of a block, or of the ends of a model.

    place: which, e.g. `block 3/30`.  rows: of layers.csv.  peak: bytes of memory.
    The error is the mean of the relative output errors of its layers, the bits are all that is
    stored of them.
    """
    weights = sum(row["rows"] * row["cols"] for row in rows)
    bits = sum(row["bits"] * row["rows"] * row["cols"] for row in rows) / max(weights, 1)
    fallen = sum(bool(reasons(row)) for row in rows)
    parts = [
        f"{place:<13}",
        f"error {_error(rows)}",
        f"{bits:5.2f} bits",
        f"peak {peak / GIB:5.1f} GiB",
        f"{seconds:6.1f} s",
    ]
    if fallen:
        parts.append(f"{fallen} fallback{'s' if fallen > 1 else ''}")
    return "  ".join(parts)


def layer_lines(row: Row) -> list[str]:
    """Return what came of a tensor, and a line for each fallback with its reason."""
    name = row["name"]
    if row["block"] is not None:
        name = name.partition(f".{row['block']}.")[2] or name
    shape = f"{row['rows']} x {row['cols']}"
    return [
        f"  {name:<22} {shape:>13}  error {_error([row])}  {row['bits']:5.2f} bits  "
        f"{row['seconds']:6.1f} s",
        *(line for reason in reasons(row) for line in wrap(reason, **WRAPPED)),
    ]


def sizes_line(sizes: Sizes) -> str:
    """Return the bits of a checkpoint."""
    return (
        f"checkpoint: {sizes.linear:.2f} linear bits, {sizes.model:.2f} model bits per weight, "
        f"{sizes.bytes / 1e6:.1f} MB"
    )


def _error(rows: Sequence[Row]) -> str:
    errors = [row["output_error"] for row in rows]
    return f"{sum(errors) / max(len(errors), 1):<8.3g}"
