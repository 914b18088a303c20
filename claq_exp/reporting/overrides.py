"""What the overrides of a job tell of its config, where there is no run folder that has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from claq_exp.reporting.labels import ACTIVATION, ALLOCATION, RECIPE, TRANSFORM, TUNE
from claq_exp.reporting.older import current_words

STRATEGIES = (  # groups whose options are called like what they choose
    *RECIPE,
    *(ALLOCATION, ACTIVATION, TRANSFORM, TUNE, "tracking"),
)


def config_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Return what overrides say of a config: `a.b=1` a value, `reservation=none` a strategy.

    An option of another group, e.g. `model=hf`, is only its text.
    """
    config: dict[str, Any] = {}
    for word in overrides:
        key, equals, text = word.lstrip("+").partition("=")
        if not equals:
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        *path, last = f"{key}.name".split(".") if key in STRATEGIES else key.split(".")
        place = config
        for part in path:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        if not isinstance(place.get(last), dict):
            place[last] = value
    return config


def agree(overrides: Sequence[str], config: dict[str, Any]) -> bool:
    """Tell whether a config may come from overrides: no value contradicts them.

    Options that are no strategies, e.g. an experiment, say nothing here.
    config: in the words of today.
    """
    return _agree(current_words(config_of(overrides)), config)


def _agree(said: Any, found: Any) -> bool:
    if isinstance(found, dict):
        values = said.items() if isinstance(said, dict) else ()
        return all(_agree(value, found[key]) for key, value in values if key in found)
    return bool(said == found)
