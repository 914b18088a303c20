"""What a recipe is called in tables and plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

RECIPE = ("codebook", "precision", "reservation", "solver")
ALLOCATION = "allocation"
ACTIVATION = "activation"
OBJECTIVE = "objective"
TRANSFORM = "transform"
TUNE = "tune"
EMBEDDING, HEAD = "embedding", "head"
SAME = "same"  # the name of the rule for a head that is quantized as the embedding
PLAIN = "plain"  # the name of the objective in which tokens count alike
KEPT = "none"  # the name of the rules that leave activations, or what is not packed, alone


def families_of(configs: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    """Return the families that tables show: those beside the recipe where any run uses them."""
    configs = list(configs)
    used = [
        family
        for family in (OBJECTIVE, ALLOCATION, ACTIVATION, TRANSFORM, TUNE, EMBEDDING, HEAD)
        if any(_beside(config, family)["name"] not in (KEPT, SAME, PLAIN) for config in configs)
    ]
    return (*RECIPE, *used)


def recipe_labels(config: dict[str, Any], families: Sequence[str] = RECIPE) -> dict[str, str]:
    """Return a few words for each family of strategies."""
    labels = {
        "codebook": codebook_label(config["codebook"]),
        "precision": _widths_label(config, "precision"),
        "reservation": _described(config["reservation"], "ratio"),
        "solver": solver_label(config["solver"]),
        OBJECTIVE: objective_label(config),
        ALLOCATION: _widths_label(config, ALLOCATION),
        ACTIVATION: activation_label(_beside(config, ACTIVATION)),
        TRANSFORM: _described(_beside(config, TRANSFORM), "alpha"),
        TUNE: _described(_beside(config, TUNE), "steps"),
        EMBEDDING: _described(_beside(config, EMBEDDING), "bits"),
        HEAD: _described(_beside(config, HEAD), "bits"),
    }
    return {family: labels[family] for family in families}


def activation_label(activation: dict[str, Any]) -> str:
    """Return a rule for activations with its bits and what shares a scale, e.g. `int 8 token`."""
    label = codebook_label(activation)
    if activation["name"] == "int":
        label = f"int {activation.get('bits')}" + label.removeprefix("int")
        label += "" if activation.get("group_size") else f" {activation.get('scope')}"
    elif activation.get("scope", "token") != "token":
        label += f" {activation['scope']}"
    return label


def solver_label(solver: dict[str, Any]) -> str:
    """Return a solver's name, with how asymmetric it is."""
    name = str(solver["name"])
    return f"{name} {_asymmetric(solver)}".strip()


def objective_label(config: dict[str, Any]) -> str:
    """Return what tokens count in, e.g. `output_gradient clip 2, 4 groups`."""
    objective = config.get(OBJECTIVE) or {"name": PLAIN}
    label = str(objective["name"])
    if objective.get("power", 1) != 1:
        label += f" power {objective['power']:g}"
    if objective.get("clip") is not None:
        label += f" clip {objective['clip']:g}"
    groups = objective.get("groups", 1)
    return f"{label}, {groups} groups" if groups > 1 else label


def _asymmetric(solver: dict[str, Any]) -> str:
    share = solver.get("asymmetric", 0)
    return f"asymmetric {share:g}" if share else ""


def _beside(config: dict[str, Any], family: str) -> dict[str, Any]:
    return config.get(family) or {"name": KEPT}


def method_label(config: dict[str, Any]) -> str:
    """Return a recipe's name without its number of bits, for the line of a plot."""
    codebook, solver = codebook_label(config["codebook"]), config["solver"]["name"]
    parts = [codebook if solver != "nearest" else f"{codebook}, nearest"]
    if asymmetric := _asymmetric(config["solver"]):
        parts.append(asymmetric)
    if (objective := objective_label(config)) != PLAIN:
        parts.append(objective)
    if (transform := _beside(config, TRANSFORM))["name"] != KEPT:
        parts.insert(0, str(transform["name"]))
    precision, reservation = config["precision"]["name"], config["reservation"]["name"]
    if (allocation := _beside(config, ALLOCATION)["name"]) != KEPT:
        return " + ".join([*parts, allocation])
    if precision != "fixed":
        parts.append(f"AP {precision}")
    if reservation != "none":
        parts.append(f"OR {reservation} {config['reservation'].get('ratio', '')}".strip())
    if (activation := _beside(config, ACTIVATION))["name"] != KEPT:
        parts.append(f"A {activation_label(activation)}")
    if (tune := _beside(config, TUNE))["name"] != KEPT:
        parts.append(f"tuned {tune['name']}")
    if (embedding := _beside(config, EMBEDDING))["name"] != KEPT:
        parts.append(f"embedding {_described(embedding, 'bits')}")
    return " + ".join(parts)


def codebook_label(codebook: dict[str, Any]) -> str:
    """Return a codebook's name with its sizes and rules, but for those of every run."""
    name, group_size = str(codebook["name"]), codebook.get("group_size")
    if name != "lo_bcq":
        label = f"{name} g{group_size}" if group_size else name
        real = " real zeros" if codebook.get("zero_point", "whole") == "real" else ""
        sought = " sought" if codebook.get("clip", "minmax") == "search" else ""
        narrow = codebook.get("scale_bits", 16)
        return label + real + sought + (f" scales {narrow}" if narrow != 16 else "")
    words = [name, f"{codebook.get('array')}/{codebook.get('codebooks')}"]
    if codebook.get("codeword_bits", 6) != 6:
        words.append(f"INT{codebook['codeword_bits']}")
    if (books := codebook.get("books", "universal")) != "universal":
        words.append(books if books == "local" else "file")
    return " ".join(words)


def _widths_label(config: dict[str, Any], family: str) -> str:
    """Return how bits are given out, with the budget or the number that the rule aims at."""
    budget, rule = config.get("budget") or {}, _beside(config, family)
    if budget.get("bits") is not None and rule["name"] != KEPT:
        return f"{rule['name']}, {budget['bits']:g} {budget['kind']}"
    return _described(rule, "target_bits", "bits")


def _described(strategy: dict[str, Any], *fields: str) -> str:
    values = [_short(strategy[field]) for field in fields if strategy.get(field) is not None]
    return " ".join([str(strategy["name"]), *values[:1]])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
