"""Which settings tell runs apart, and which runs are the same but for their seeds."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from claq_exp.errors import ConfigError
from claq_exp.reporting.collect import Run, lookup
from claq_exp.run_folder import NEUTRAL

NAMED = 4  # differing keys that a message names


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value; lists and empty groups become JSON text."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            is_plain = not isinstance(value, (dict, list))
            flat[prefix + key] = value if is_plain else json.dumps(value)
    return flat


def setting(config: dict[str, Any], key: str) -> Any:
    """Return the value at a dotted key; for a strategy its name, for other groups JSON text."""
    value = lookup(config, key)
    if isinstance(value, dict) and "name" in value:
        return value["name"]
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def full_key(runs: Sequence[Run], key: str) -> str:
    """Return a key as `setting` reads it: `solver` stands for `solver.name`.

    Raises ConfigError for a key that no run has.
    """
    values = [lookup(run.config, key) for run in runs]
    if all(value is None for value in values):
        known = {known for run in runs for known in flatten(run.config)}
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"report: no run has a config key '{key}'{hint}")
    named = any(isinstance(value, dict) and "name" in value for value in values)
    return f"{key}.name" if named else key


def is_neutral(key: str) -> bool:
    """Tell the settings that change no result."""
    return key in NEUTRAL or key.partition(".")[0] in NEUTRAL


def is_seed(key: str) -> bool:
    """Tell the settings that only choose one of many equal draws; other texts are no such draw."""
    return key.rpartition(".")[2] == "seed" and not key.startswith("evaluation.")


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the keys, of settings that change results, in which runs differ."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    absent = object()
    return [
        key
        for key in keys
        if not is_neutral(key)
        and any(settings.get(key, absent) != flat[0].get(key, absent) for settings in flat)
    ]


def seedless(run: Run) -> tuple[tuple[str, Any], ...]:
    """Return the settings that runs have in common which differ in nothing but seeds."""
    flat = flatten(run.config)
    return tuple(sorted((k, v) for k, v in flat.items() if not is_neutral(k) and not is_seed(k)))


def check_seeds_only(runs: Sequence[Run], place: str, advice: str) -> None:
    """Raise ConfigError unless runs that a row or cell merges differ in their seeds, and only so.

    place: what they share, for the message.  advice: what keeps them apart; ends in a comma where
    a key belongs behind it.
    """
    if len(runs) < 2:
        return
    keys = differing(runs)
    if others := [key for key in keys if not is_seed(key)]:
        named = ", ".join(others[:NAMED])
        named += f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        raise ConfigError(
            f"report: {len(runs)} runs share {place} and differ in {named}; only seeds are merged, "
            f"so add one of these, e.g. {advice}{others[0]}"
        )
    seen: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        flat = flatten(run.config)
        twin = seen.setdefault(tuple(flat[key] for key in keys), run)
        if twin is not run:
            other = advice + "name" if advice.endswith(",") else advice
            raise ConfigError(
                f"report: {twin.folder} and {run.folder} have the same settings and seeds, so they "
                f"are one draw, not two; report one of them, or {other}"
            )
