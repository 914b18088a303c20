"""Tables of a checkpoint that others made: its bits and accounts."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from claq_exp.foreign.found import Foreign
    from claq_exp.foreign.ledger import ForeignLedger


def foreign_tables(foreign: Foreign, ledger: ForeignLedger) -> list[Table]:
    """Return what a checkpoint holds: sizes, ledger, and the types of its linear layers."""
    return [_sizes(foreign, ledger), _accounts(ledger), _kinds(ledger)]


def linears_table(ledger: ForeignLedger) -> Table:
    """Return one row per linear layer: bits, and the suffix and type of each stored tensor."""
    table = Table(header_style="bold", box=SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    for column in ("shape", "nominal", "stored"):
        table.add_column(column, justify="right")
    table.add_column("storage")
    for linear in ledger.linears:
        table.add_row(
            escape(linear.name),
            f"{linear.rows} x {linear.columns}",
            f"{linear.nominal:.3f}",
            f"{linear.bits:.3f}",
            escape(", ".join(linear.storage)),
        )
    return table


def _sizes(foreign: Foreign, ledger: ForeignLedger) -> Table:
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    about = foreign.about()
    table.add_row("external", escape(foreign.method))
    if about["written_by"]:
        table.add_row("written by", escape(about["written_by"]))
    table.add_row("model", escape(ledger.model_type))
    table.add_row("parameters", f"{ledger.parameters:,}")
    table.add_row("linear layers", f"{len(ledger.linears)} with {ledger.weights:,} weights")
    for kind in ("nominal", "linear", "model"):
        table.add_row(f"{kind} bits per weight", f"{getattr(ledger, kind):.3f}")
    half = 2 * ledger.parameters
    table.add_row("checkpoint", f"{ledger.bytes / 1e6:.1f} MB, 16-bit {half / 1e6:.1f} MB")
    return table


def _accounts(ledger: ForeignLedger) -> Table:
    """Show the ledger; bits per weight add up to the linear bits."""
    table = _right("ledger", "MB", "% of checkpoint", "bits per linear weight")
    for account, bits in sorted(ledger.accounts.items(), key=lambda item: -item[1]):
        share = f"{bits / ledger.weights:.4f}" if account in ledger.of_linears else ""
        if bits:
            size = f"{bits / 8e6:.2f}"
            table.add_row(account, size, f"{12.5 * bits / ledger.bytes:.2f}", share)
    total = f"{ledger.bytes / 1e6:.2f}"
    table.add_row("total", total, "100.00", f"{ledger.linear:.4f}", style="bold")
    return table


def _kinds(ledger: ForeignLedger) -> Table:
    """Show how many linear layers are stored in which way."""
    table = Table(header_style="bold")
    table.add_column("storage of linear layers")
    for column in ("layers", "% of weights", "stored bits"):
        table.add_column(column, justify="right")
    ordered = sorted(ledger.linears, key=lambda linear: sorted(linear.storage))
    for storage, found in groupby(ordered, key=lambda linear: sorted(linear.storage)):
        layers = list(found)
        weights = sum(layer.weights for layer in layers)
        bits = sum(layer.stored for layer in layers) / weights
        share = f"{100 * weights / ledger.weights:.1f}"
        table.add_row(escape(", ".join(storage)), f"{len(layers):,}", share, f"{bits:.3f}")
    return table


def _right(first: str, *others: str) -> Table:
    table = Table(header_style="bold")
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right")
    return table
