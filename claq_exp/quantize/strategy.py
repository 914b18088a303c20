"""How a strategy is found: by its short name in its family's dict, or by a dotted path."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from claq_exp.errors import ConfigError, one_of, telling_line


def find_strategy(family: str, members: Mapping[str, type], name: str) -> type:
    """Return the class called `name`: a key of `members` or `package.module:Class`.

    Raises ConfigError that lists the members when there is no such class.
    """
    if ":" not in name:
        if name not in members:
            hint = " or give your own as package.module:Class"
            raise ConfigError(one_of(f"{family}.name", name, members) + hint)
        return members[name]
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # a person's own module can do anything
        reason = f"{type(error).__name__}: {telling_line(error)}"
        raise ConfigError(f"{family}.name '{name}' cannot be imported: {reason}") from error
    if not isinstance(found, type):
        raise ConfigError(f"{family}.name '{name}' is not a class")
    return found


def check_members(family: str, strategy: object, protocol: type) -> None:
    """Raise ConfigError where a strategy lacks what its family's protocol names.

    A class that inherits from the protocol has the defaults of what can have one.
    """
    named = {**protocol.__annotations__, **vars(protocol)}
    missing = [name for name in named if not name.startswith("_") and not hasattr(strategy, name)]
    if missing:
        own = type(strategy)
        raise ConfigError(
            f"{family}.name={own.__module__}:{own.__qualname__} has no {', '.join(missing)}; let "
            f"it inherit from {protocol.__module__}.{protocol.__qualname__}"
        )
