"""What a recipe is called in tables and plots."""

from __future__ import annotations

from typing import Any

RECIPE = ("codebook", "precision", "reservation", "solver")


def recipe_labels(config: dict[str, Any]) -> dict[str, str]:
    """Return a few words for each family of strategies."""
    return {
        "codebook": codebook_label(config["codebook"]),
        "precision": precision_label(config),
        "reservation": _described(config["reservation"], "ratio"),
        "solver": str(config["solver"]["name"]),
    }


def method_label(config: dict[str, Any]) -> str:
    """Return a recipe's name without its number of bits, for the line of a plot."""
    codebook, solver = codebook_label(config["codebook"]), config["solver"]["name"]
    parts = [codebook if solver != "nearest" else f"{codebook}, nearest"]
    precision, reservation = config["precision"]["name"], config["reservation"]["name"]
    if precision == "rate_distortion":
        return f"{parts[0]} + {precision}"
    if precision != "fixed":
        parts.append(f"AP {precision}")
    if reservation != "none":
        parts.append(f"OR {reservation} {config['reservation'].get('ratio', '')}".strip())
    return " + ".join(parts)


def codebook_label(codebook: dict[str, Any]) -> str:
    """Return a codebook's name, with its group size where it has one."""
    group_size = codebook.get("group_size")
    return f"{codebook['name']} g{group_size}" if group_size else str(codebook["name"])


def precision_label(config: dict[str, Any]) -> str:
    """Return how bits are given out, with the budget or the number that the rule aims at."""
    budget = config.get("budget") or {}
    if budget.get("bits") is not None:
        return f"{config['precision']['name']}, {budget['bits']:g} {budget['kind']}"
    return _described(config["precision"], "target_bits", "bits")


def _described(strategy: dict[str, Any], *fields: str) -> str:
    values = [_short(strategy[field]) for field in fields if strategy.get(field) is not None]
    return " ".join([str(strategy["name"]), *values[:1]])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
