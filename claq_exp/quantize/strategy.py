"""How a strategy is found and made: by its short name in its family's dict, or a dotted path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from claq_exp.errors import ConfigError, one_line, one_of, telling_line


def find_strategy(family: str, members: Mapping[str, type], name: str) -> type:
    """Return the class called `name`: a key of `members` or `package.module:Class`.

    Raises ConfigError that lists the members if there is no such class.
    """
    if ":" not in name:
        if name not in members:
            hint = " or give your own as package.module:Class"
            raise ConfigError(one_of(f"{family}.name", name, members) + hint)
        return members[name]
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(_imported(module_name), class_name)
    except Exception as error:  # a person's own module can do anything
        reason = f"{type(error).__name__}: {telling_line(error)}"
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            reason = (
                f"no module {error.name} is installed or in {Path.cwd()}; type the command where "
                f"{error.name}.py is"
            )
        raise ConfigError(f"{family}.name '{name}' cannot be imported: {reason}") from error
    if not isinstance(found, type):
        raise ConfigError(f"{family}.name '{name}' is not a class")
    return found


def _imported(name: str) -> ModuleType:
    """Import a module that is installed, or that lies in the working directory.

    An installed command does not look into the working directory by itself, as `python -m` does.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        here = str(Path.cwd())
        if error.name != name.partition(".")[0] or here in sys.path:
            raise
        sys.path.append(here)  # last: nothing that is installed is hidden
        importlib.invalidate_caches()
        return importlib.import_module(name)


def code_file(name: str) -> Path | None:
    """Return the source file of a strategy `package.module:Class`; None for a short name."""
    if ":" not in name:
        return None
    path = _imported(name.partition(":")[0]).__file__
    return None if path is None else Path(path)


def strategy_name(members: Mapping[str, type], strategy: object) -> str:
    """Return the name by which `find_strategy` finds the class of a strategy."""
    own = type(strategy)
    short = next((name for name, member in members.items() if member is own), None)
    return short or f"{own.__module__}:{own.__qualname__}"


def make_strategy(family: str, members: Mapping[str, type], values: Mapping[str, Any]) -> Any:
    """Return the strategy that a config group describes: a name, and the fields of that name.

    Raises ConfigError for an unknown name, field or value.
    """
    options = dict(values)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{family}.name is missing; choose one of: {', '.join(members)}")
    strategy = find_strategy(family, members, name)
    own = {field.name for field in fields(strategy)}
    siblings = {field.name for member in members.values() for field in fields(member)}
    for left_over in siblings - own:  # an experiment's field, whose option was replaced
        options.pop(left_over, None)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(strategy), options))
    except ConfigError as error:
        where = "" if f"{family}." in str(error) else f"{family}={name}: "
        raise ConfigError(f"{where}{error}") from error
    except OmegaConfBaseException as error:
        known = ", ".join(sorted(own)) or "none"
        raise ConfigError(f"{family}={name}: {one_line(error)} (its fields: {known})") from error


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
