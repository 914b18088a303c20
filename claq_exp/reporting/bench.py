"""Tables of how fast a checkpoint runs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from claq_exp.runtime.bench import GenerationRow, LinearRow
from claq_exp.runtime.kernels import DENSE, KERNEL


def generation_table(rows: Sequence[GenerationRow], tokens: int) -> Table:
    """Return a row per kernel: tokens per second, against dense, and bytes of the linear layers."""
    table = Table(title=f"generating {tokens} tokens, batch 1", header_style="bold")
    table.add_column("kernel")
    for heading in ("tokens/s", "against dense", "linear layers, MB"):
        table.add_column(heading, justify="right")
    if any(row.note for row in rows):
        table.add_column("")
    dense = next((row.tokens_per_second for row in rows if row.kernel == DENSE), None)
    for row in rows:
        if row.tokens_per_second is None or row.linear_bytes is None:
            table.add_row(row.kernel, "", "", "", escape(row.note))
            continue
        ratio = f"{row.tokens_per_second / dense:.2f}" if dense else ""
        speed, size = f"{row.tokens_per_second:.1f}", f"{row.linear_bytes / 1e6:.1f}"
        table.add_row(row.kernel, speed, ratio, size)
    return table


def linear_table(rows: Sequence[LinearRow]) -> Table:
    """Return a row per kind of layer: bytes, and the time of each kernel over torch's dense one."""
    table = Table(title="one product, batch 1", header_style="bold")
    table.add_column("layer", no_wrap=True)
    used = [name for name in KERNEL if any(name in row.seconds for row in rows)]
    headings = ("rows x columns", "bits", "dense / packed bytes", "dense, µs")
    for heading in (*headings, *(f"{name} / dense" for name in used)):
        table.add_column(heading, justify="right", min_width=6)
    for row in rows:
        dense = row.seconds[DENSE]
        table.add_row(
            row.layer,
            f"{row.rows}x{row.columns}",
            row.bits,
            f"{row.dense_bytes / row.stored_bytes:.1f}",
            f"{1e6 * dense:.0f}",
            *(f"{row.seconds[name] / dense:.2f}" if name in row.seconds else "" for name in used),
        )
    return table
