"""Results of `claq-exp evaluate` on a checkpoint that others made, as a row beside own runs."""

from __future__ import annotations

from typing import Any

EVALUATED, EXTERNAL = "evaluated", "external"


def is_external(results: dict[str, Any]) -> bool:
    """Tell whether results are of a checkpoint that others made."""
    return results.get("status") == EVALUATED and isinstance(results.get(EXTERNAL), dict)


def as_run(results: dict[str, Any]) -> dict[str, Any]:
    """Return such results with a `config` that tables can read: whose format, by which package.

    A checkpoint that was measured without its original is a model of its own.  Raises KeyError or
    TypeError for damaged results.
    """
    external = results[EXTERNAL]
    name = external["name"]
    model = external["model"] or {"name": name, "source": results["checkpoint"]}
    kind = f"{external['quant_method']} {external['form']}".strip()
    format_ = {"name": f"{kind} (external)", "checkpoint": results["checkpoint"]}
    if external.get("group_size"):
        format_["group_size"] = external["group_size"]
    maker = external["written_by"] or f"{external['package']} {external['version']}"
    bits = round(float(results["bits"]["nominal"]), 2)
    config = {
        "model": model,
        "codebook": format_,
        "precision": {"name": "fixed" if bits.is_integer() else "mixed", "bits": bits},
        "reservation": {"name": "none"},
        "solver": {"name": maker},
        "evaluation": results["evaluation"],
    }
    return {**results, "config": config}
