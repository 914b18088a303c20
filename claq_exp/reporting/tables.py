"""Tables for people."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from claq_exp.evaluation.caveats import caveats
from claq_exp.evaluation.zero_shot import is_accuracy
from claq_exp.reporting.cells import number
from claq_exp.run_folder.fallbacks import fallback_notes
from claq_exp.sources.notes import source_notes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from claq_exp.checkpoint.summary import LayerSummary, Summary
    from claq_exp.payload.base import Layout
    from claq_exp.run.inputs import Input
    from claq_exp.run.plan import Plan

ORIGINAL_BITS = 16.0
HASH = 12  # digits of a content hash that are shown
OVERLAP = 0.001  # of a corpus' tokens: less is set phrases
BAR = 30  # characters of the longest bar of a histogram
FULLEST = 5  # layers that are named for their reserved entries


def result_table(results: dict[str, Any]) -> Table:
    """Return one run as a table: a row per measure, original against quantized.

    A stage after which the model was measured too has a column between them.
    """
    table = Table(title=None, header_style="bold")
    table.add_column("")
    stages = results.get("after", {})
    for heading in ("original", *(f"after {stage}" for stage in stages), "quantized"):
        table.add_column(heading, justify="right")
    between = [_after_cells(results, row) for row in stages.values()]
    for label, original, quantized in result_rows(results):
        table.add_row(label, original, *(cells.get(label, "") for cells in between), quantized)
    return table


def _after_cells(results: dict[str, Any], row: dict[str, Any]) -> dict[str, str]:
    """Return the label of a row of `result_rows` -> its value after a stage."""
    put: dict[str, Any] = {part: {} for part in ("perplexity", "kl", "zero_shot")}
    keys = {"perplexity": "quantized", "kl": "mean", "zero_shot": "quantized"}
    for part, key in keys.items():
        for name, value in row[part].items():
            put[part][name] = {**results[part][name], key: value, "stderr": None}
    average = {"original": None, "quantized": row["average_accuracy"]}
    then = {**results, **put, "average_accuracy": average if average["quantized"] else None}
    measured = ("perplexity,", "KL ", "average ", *row["zero_shot"])
    return {
        label: cell for label, _, cell in result_rows(then) if label.startswith(tuple(measured))
    }


def result_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (measure, original, quantized) as text."""
    bits, size = results["bits"], results["size"]
    parameters = 8 * size["checkpoint_bytes"] / bits["model"]
    original_bits = {
        "nominal": ORIGINAL_BITS,
        "linear": ORIGINAL_BITS,
        "model": 8 * size["original_bytes"] / parameters,
    }
    rows = [
        (f"{kind} bits per weight", f"{original_bits[kind]:.2f}", f"{bits[kind]:.2f}")
        for kind in ("nominal", "linear", "model")
    ]
    if rounded := bits.get("activation"):
        rows.append(("bits per activation", f"{ORIGINAL_BITS:.2f}", f"{rounded:.2f}"))
    rows.append(
        ("checkpoint, MB", _megabytes(size["original_bytes"]), _megabytes(size["checkpoint_bytes"]))
    )
    for name, row in results["perplexity"].items():
        label = f"perplexity, {name} ({row['tokens']:,} tokens)"
        rows.append((label, _number(row["original"], 2), _number(row["quantized"], 2)))
    for name, row in results.get("kl", {}).items():
        label = f"KL from original, {name} ({row['tokens']:,} tokens)"
        rows.append((label, "", _number(row["mean"], 4)))
    for name, row in results["zero_shot"].items():
        label = f"{name} {row['metric']} ({row['rows']:,} rows)"
        style = (1, 100) if is_accuracy(row["metric"]) else (2, 1)
        error = f" ± {_number(row['stderr'], *style)}" if row["stderr"] else ""
        rows.append(
            (label, _number(row["original"], *style), _number(row["quantized"], *style) + error)
        )
    if average := results.get("average_accuracy"):
        before, after = (_number(average[key], 1, 100) for key in ("original", "quantized"))
        rows.append(("average accuracy", before, after))
    if layers := results.get("fallbacks", {}).get("layers"):
        rows.append(("layers with a fallback", "", f"{layers:,}"))
    return rows


def overlap_notes(results: dict[str, Any]) -> list[str]:
    """Return a line for each corpus whose text calibration has seen in parts."""
    return [
        f"{100 * row['overlap']:.1f} % of the tokens of {name} are in passages that the "
        "calibration text holds too; its perplexity flatters the quantized model"
        for name, row in results["perplexity"].items()
        if (row.get("overlap") or 0.0) >= OVERLAP
    ]


def result_notes(results: dict[str, Any]) -> list[str]:
    """Return the lines below a run's table: what makes its numbers worth less than they look."""
    return [
        *external_notes(results),
        *text_notes(results),
        *overlap_notes(results),
        *source_notes(results.get("source", {})),
        *(caveat.words for caveat in caveats(results)),
        *fallback_notes(results.get("fallbacks", {})),
    ]


def external_notes(results: dict[str, Any]) -> list[str]:
    """Return who made a checkpoint that is not of this project, and what its bits leave open."""
    external = results.get("external")
    if not external:
        return []
    by = f", written by {external['written_by']}" if external["written_by"] else ""
    loaded = f"loaded with {external['package']} {external['version']}"
    return [f"external: {external['quant_method']}{by}, {loaded}", *external["notes"]]


def text_notes(results: dict[str, Any]) -> list[str]:
    """Return a line for each text of which something was not read as it stands."""
    notes = []
    for name, row in results.get("texts", {}).items():
        if skipped := row["records_skipped"]:
            notes.append(f"{name}: records whose text is null were skipped: {skipped:,}")
        if damaged := row["characters_damaged"]:
            notes.append(f"{name}: characters that are damaged, or control ones: {damaged:,}")
    return notes


def input_lines(inputs: Mapping[str, Input]) -> list[str]:
    """Return a line for each input: what, from where, size, beginning of its hash, and place."""
    rows = [
        (
            key.replace("corpora.", "corpus ").replace("zero_shot.", "task "),
            found.origin,
            _file_size(sum(path.stat().st_size for path in found.files)) if found.files else "",
            found.content[:HASH],
            _place(found.files),
        )
        for key, found in inputs.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return [
        "  ".join([*map(str.ljust, row[:-1], widths), row[-1]])  # no table, for a path stays whole
        for row in rows
    ]


def _place(files: Sequence[Path]) -> str:
    if not files:
        return "cache of the library datasets"
    return str(files[0] if len(files) == 1 else files[0].parent)


def _file_size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _gibibytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def plan_table(plan: Plan) -> Table:
    """Return what a run will take."""
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    sizes = plan.sizes
    rows = [
        ("parameters", f"{plan.parameters:,}"),
        ("linear layers", f"{len(plan.layouts)} in {plan.blocks} blocks"),
        *((escape(end.name), _end(end.layout())) for end in plan.ends),
        ("nominal bits per weight", f"{sizes.nominal:.3f}"),
        ("linear bits per weight", f"{sizes.linear:.3f}"),
        ("model bits per weight", f"{sizes.model:.3f}"),
        (
            "checkpoint",
            f"{_megabytes(sizes.bytes)} MB, 16-bit {_megabytes(plan.original_bytes)} MB",
        ),
    ]
    if plan.activation_bits is not None:
        rows.insert(-1, ("bits per activation", f"{plan.activation_bits:.3f}"))
    total = sizes.ledger.total
    rows += [
        (f"  {account}", f"{100 * bits / total:.1f} %")
        for account, bits in sizes.ledger.as_dict().items()
        if bits
    ]
    for where, stages in (("memory", plan.needs.host), ("GPU memory", plan.needs.device)):
        if stages:
            rows.append((f"{where}, about", _gibibytes(max(stages.values()))))
            rows += [(f"  {stage}", _gibibytes(taken)) for stage, taken in stages.items()]
    if plan.needs.streams:
        rows.append(("measured", "block by block"))
    rows.append(("disk, about", _gibibytes(plan.needs.disk)))
    rows.append(("time, about", _duration(sum(plan.seconds.values()))))
    rows += [(f"  {stage}", _duration(seconds)) for stage, seconds in plan.seconds.items()]
    for row in rows:
        table.add_row(*row)
    return table


def summary_tables(summary: Summary) -> list[Table]:
    """Return what a checkpoint holds: sizes, ledger, column bits and reserved entries."""
    tables = [_sizes_table(summary), _ledger_table(summary), _column_bits_table(summary)]
    if summary.reserved:
        tables.append(_reserved_table(summary))
    return tables


def layers_table(layers: Sequence[LayerSummary]) -> Table:
    """Return one row per quantized layer."""
    table = _right_table("layer", "shape", "bits:columns", "nominal", "stored", "reserved")
    table.box = SIMPLE_HEAD
    table.caption = _dropped(layers)
    for layer, name in zip(layers, _short_names(layers), strict=True):
        layout = layer.layout
        widths = layout.widths().items()
        table.add_row(
            escape(name),
            f"{layout.rows} x {layout.columns}",
            " ".join(f"{width}:{columns}" for width, columns in widths),
            f"{layout.nominal_bits():.3f}",
            f"{layer.stored_bits:.3f}",
            f"{100 * layer.reserved_share:.2f} %",
        )
    return table


def _sizes_table(summary: Summary) -> Table:
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    sizes, half = summary.sizes, int(2 * summary.parameters)
    table.add_row("model", escape(summary.model_type))
    table.add_row("parameters", f"{summary.parameters:,}")
    table.add_row("linear layers", f"{len(summary.layers)} with {summary.weights:,} weights")
    table.add_row("payload", _payloads(summary.layers))
    for end in summary.ends:
        table.add_row(escape(end.name), _end(end.layout))
    if summary.rounding is not None:
        table.add_row("activations", summary.rounding.describe())
    for kind in ("nominal", "linear", "model"):
        table.add_row(f"{kind} bits per weight", f"{getattr(sizes, kind):.3f}")
    table.add_row("checkpoint", f"{_megabytes(sizes.bytes)} MB, 16-bit {_megabytes(half)} MB")
    return table


def _ledger_table(summary: Summary) -> Table:
    """Show the ledger; bits per weight add up to the linear bits."""
    table = _right_table("ledger", "MB", "% of checkpoint", "bits per linear weight")
    ledger = summary.sizes.ledger
    for account, bits in ledger.as_dict().items():
        apart = account in ("unquantized", "embedding")
        share = "" if apart else f"{bits / summary.weights:.4f}"
        if bits:
            size = f"{bits / 8e6:.2f}"
            table.add_row(account, size, f"{100 * bits / ledger.total:.2f}", share)
    total = f"{ledger.total / 8e6:.2f}"
    table.add_row("total", total, "100.00", f"{summary.sizes.linear:.4f}", style="bold")
    return table


def _column_bits_table(summary: Summary) -> Table:
    """Show the histogram of code widths over the columns of all layers."""
    counts = summary.column_bits()
    total, most = sum(counts.values()), max(counts.values())
    table = _right_table("bits", "columns", "%")
    table.add_column("")
    for width, columns in counts.items():
        bar = "█" * max(1, round(BAR * columns / most))
        table.add_row(str(width), f"{columns:,}", f"{100 * columns / total:.1f}", bar)
    return table


def _reserved_table(summary: Summary) -> Table:
    """Show the layers that reserve most, and all together."""
    table = _right_table(
        "reserved entries", "number", "% of entries", "% in fullest 1 % of columns"
    )
    table.caption = _dropped(summary.layers)
    named = list(zip(_short_names(summary.layers), summary.layers, strict=True))
    named.sort(key=lambda pair: (-pair[1].reserved_share, -pair[1].layout.reserved))
    for name, layer in named[:FULLEST]:
        if layer.layout.reserved:
            table.add_row(*_reserved_row(name, [layer]))
    table.add_row(*_reserved_row("all layers", summary.layers), style="bold")
    return table


def _reserved_row(name: str, layers: Sequence[LayerSummary]) -> list[str]:
    number = sum(layer.layout.reserved for layer in layers)
    share = number / sum(layer.layout.weights for layer in layers)
    full = sum(layer.in_full_columns for layer in layers) / number
    return [escape(name), f"{number:,}", f"{100 * share:.2f}", f"{100 * full:.1f}"]


def _short_names(layers: Sequence[LayerSummary]) -> list[str]:
    """Return the names of layers without the dotted beginning that all of them share."""
    common = _common(layers)
    return [layer.name.removeprefix(common) for layer in layers]


def _dropped(layers: Sequence[LayerSummary]) -> str | None:
    common = _common(layers)
    return f"names begin with {escape(common)}" if common else None


def _common(layers: Sequence[LayerSummary]) -> str:
    parents = [layer.name.split(".")[:-1] for layer in layers]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
    return "".join(f"{parts[0]}." for parts in shared)


def _payloads(layers: Sequence[LayerSummary]) -> str:
    """Return what the codes of layers stand for, e.g. `column codebooks`."""
    kinds: dict[str, int] = {}
    for layer in layers:
        kind = layer.layout.describe()
        kinds[kind] = kinds.get(kind, 0) + 1
    if len(kinds) == 1:
        return next(iter(kinds))
    return "\n".join(f"{number} x {kind}" for kind, number in kinds.items())


def _end(layout: Layout) -> str:
    """Describe a packed embedding or head."""
    widths = "/".join(map(str, layout.widths()))
    stored = layout.ledger().total / layout.weights
    shape = f"{layout.rows} x {layout.columns}"
    return f"{shape}, {layout.describe()}, {widths} bits ({stored:.3f} stored)"


def _right_table(first: str, *others: str) -> Table:
    table = Table(header_style="bold")
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right")
    return table


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    return "" if value is None else number(factor * value, digits)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"
