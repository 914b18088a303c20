"""Layouts as versions 2 and 3 of the format wrote them: the same keys for every kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from claq_exp.errors import CheckpointError, one_of
from claq_exp.payload.base import whole_numbers

OLDEST = 2  # that is still read
KEYS = {
    *("kind", "rows", "columns", "columns_per_width", "group_size"),
    *("shared_codebooks", "row_scaled", "reserved", "most_reserved"),
}
FLAGS = ("shared_codebooks", "row_scaled")
CODED = ("rows", "columns", "columns_per_width", "reserved", "most_reserved")
FORMAT = "block_format"  # a kind, and a key of it: from version 3 on
KINDS = ("column_codebooks", "row_grid", FORMAT)


def current_layout(data: Any, version: int) -> dict[str, Any]:
    """Return the JSON that the present version has for a layout of version 2 or 3.

    Raises CheckpointError for a key too many or too few, or for keys that contradict each other.
    """
    if not isinstance(data, dict) or set(data) - {FORMAT} != KEYS:
        raise CheckpointError(f"a layout must have the keys {sorted(KEYS)}")
    if any(type(data[flag]) is not bool for flag in FLAGS):
        raise CheckpointError(f"{' and '.join(FLAGS)} must be true or false")
    whole_numbers(data["group_size"])
    kind, form = data["kind"], data.get(FORMAT)
    if form is not None and version < 3:
        raise CheckpointError(f"version {version} knows no block format")
    if (kind == FORMAT) != (form is not None):
        raise CheckpointError(f"the layout of a {kind} and its block_format do not fit")
    coded = {key: data[key] for key in CODED}
    if kind == "column_codebooks":
        new = "shared_codebooks" if data["shared_codebooks"] else kind
        return {"kind": new, **coded, "row_scaled": data["row_scaled"]}
    if any(data[flag] for flag in FLAGS):
        raise CheckpointError(f"a {kind} has neither shared codebooks nor row scales")
    if kind == "row_grid":
        return {"kind": kind, **coded, "group_size": data["group_size"]}
    if kind == FORMAT:
        return _block_format(data, form)
    raise CheckpointError(one_of("kind of a quantized weight", kind, KINDS))


def _block_format(data: Mapping[str, Any], form: Any) -> dict[str, Any]:
    bits = form.get("bits") if isinstance(form, dict) else None
    if data["columns_per_width"] != {str(bits): data["columns"]}:
        raise CheckpointError("a block format has codes of its own width")
    if data["reserved"] or data["most_reserved"]:
        raise CheckpointError("a block format has no reserved entries")
    return {
        "kind": FORMAT,
        "rows": data["rows"],
        "columns": data["columns"],
        FORMAT: form,
    }
