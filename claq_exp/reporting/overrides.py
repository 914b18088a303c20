"""What the overrides of a job tell of its config, where there is no run folder that has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml


def config_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Return what overrides say of a config: `a.b=1` a value, `reservation=none` a name."""
    config: dict[str, Any] = {}
    for word in overrides:
        key, equals, text = word.lstrip("+").partition("=")
        if not equals:
            continue
        *path, last = key.split(".")
        place = config
        for part in path:
            inner = place.setdefault(part, {})
            place = inner if isinstance(inner, dict) else {}
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        known = place.get(last)
        fields = known if isinstance(known, dict) else {}
        named = not path and isinstance(value, str)  # a group's option is called like its strategy
        place[last] = {**fields, "name": value} if named else value
    return config


def agree(overrides: Sequence[str], config: dict[str, Any]) -> bool:
    """Tell whether a config may come from overrides: no value contradicts them.

    Options that are no strategies, e.g. an experiment, say nothing here.
    """
    return _agree(config_of(overrides), config)


def _agree(said: Any, found: Any) -> bool:
    if isinstance(said, dict) and isinstance(found, dict):
        return all(_agree(value, found[key]) for key, value in said.items() if key in found)
    if isinstance(said, dict):
        return "name" not in said or said["name"] == found
    return bool(said == found)
