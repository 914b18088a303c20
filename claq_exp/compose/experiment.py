"""From words on the command line to a checked config, with Hydra's composition."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from claq_exp.compose.options import PRIMARY, groups, hydra_ready
from claq_exp.config import FAMILIES, ExperimentConfig, config_from_omegaconf
from claq_exp.errors import ConfigError, one_line

PARAMS = "hydra.sweeper.params"
EXTRAS = {  # option of Hydra's that a package brings -> our extra with that package
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/ray": "ray",
    "hydra/sweeper/optuna": "optuna",
}


HYDRA_ERRORS = (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError, OSError)
GLOBAL = ("experiment", "sweep")  # groups whose files set keys of the whole experiment
HEADER = "# @package _global_"
OF_A_SWEEP = ("launcher", "sweeper", "callbacks", "hydra_logging", "job.env_set", "job.env_copy")
FILLED_IN = (  # what Hydra itself writes into a composed config, and what this module reads
    *("runtime", "overrides", "mode", "searchpath"),
    *("job.config_name", "job.override_dirname", "job.num", "job.id"),
)
INSTEAD = {  # part of Hydra's own settings -> the word that has its effect here
    "run": "outputs= and name= say where a run goes",
    "sweep": "outputs= and name= say where runs go",
    "output_subdir": "the settings of a run are in its results.json",
    "job.chdir": "paths are relative to the folder that the command is typed in",
    "job.name": "name= names the runs, hydra.launcher.name= the jobs on a cluster",
    "job_logging": "events.jsonl is the record of a run, third_party.log holds what libraries say",
    "verbose": "--debug shows where an error comes from",
}
MOVED = {  # word of older versions -> the one that has its effect now
    "precision=rate_distortion": "allocation=rate_distortion, with its fields as allocation.FIELD",
    "reservation=rate_distortion": "part of allocation=rate_distortion (allocation.reserve=true)",
    **{
        f"precision.{field}": f"allocation.{field}"
        for field in (
            *("count", "importance", "codebooks", "row_scales", "row_weights"),
            *("min_bits", "max_bits", "windows"),
        )
    },
    "reservation.small": "allocation.small",
    "reservation.large": "allocation.large",
}


def compose_config(overrides: list[str]) -> ExperimentConfig:
    """Compose and check one experiment.

    Raises ConfigError with one line that names the alternatives.
    """
    _refuse_several(overrides)
    composed = compose_all(overrides)
    if is_multirun(composed):
        chosen = composed.hydra.runtime.choices.get("sweep")
        word = f"sweep={chosen}" if chosen else "hydra.mode=MULTIRUN"
        raise ConfigError(f"{word} is many experiments, and this takes one; write one of its jobs")
    return _checked(composed)


def compose_unless_sweep(overrides: list[str]) -> ExperimentConfig | None:
    """Compose and check one experiment; None where the overrides name a sweep by themselves.

    Raises ConfigError as `compose_config` does.
    """
    composed = compose_all([text for text in overrides if not is_swept(text)])
    if is_multirun(composed):
        return None
    _refuse_several(overrides)
    return _checked(composed)


def _refuse_several(overrides: list[str]) -> None:
    if several := [text for text in overrides if is_swept(text)]:
        raise ConfigError(
            f"'{several[0]}' lists several values; add -m to run each of them{_or_one(several[0])}"
        )


def _checked(composed: DictConfig) -> ExperimentConfig:
    check_hydra(composed, swept=False)
    return config_from_omegaconf(experiment_part(composed))


def check_words(overrides: list[str]) -> None:
    """Raise ConfigError unless the overrides compose; their values are not looked at."""
    if several := [text for text in overrides if is_swept(text)]:
        raise ConfigError(f"'{several[0]}' lists several values; choose one to print")
    check_hydra(compose_all(overrides), swept=True)


def is_multirun(composed: DictConfig) -> bool:
    """Tell whether a composed config, Hydra's own part included, asks for many experiments."""
    mode = composed.hydra.mode
    return mode is not None and mode.name == "MULTIRUN"


def compose_all(overrides: list[str]) -> DictConfig:
    """Compose an experiment with Hydra's own part, unchecked.

    Raises ConfigError with one line that names the alternatives.
    """
    for text in overrides:
        if (key := text.lstrip("+~")).startswith(PARAMS):
            grid = key.removeprefix(PARAMS).lstrip(".=")
            raise ConfigError(f"{text}: write it without the prefix, and add -m: {grid}")
    with explained(overrides), hydra_ready():
        composed = compose(PRIMARY, overrides=overrides, return_hydra_config=True)
    for group in GLOBAL:
        if composed.get(group) is not None:
            option = composed.hydra.runtime.choices.get(group)
            raise ConfigError(
                f"{group}={option}: its settings would have no effect; the first line of its file "
                f"must be '{HEADER}'"
            )
    return composed


@contextlib.contextmanager
def explained(overrides: list[str]) -> Iterator[None]:
    """Turn what Hydra raises into a ConfigError of one line."""
    try:
        yield
    except HYDRA_ERRORS as error:
        raise ConfigError(_explain(error, overrides)) from error


def check_hydra(composed: DictConfig, *, swept: bool) -> None:
    """Raise ConfigError for a setting of Hydra's own that has no effect here."""
    for place in composed.hydra.searchpath:
        if not _there(str(place)):
            raise ConfigError(f"hydra.searchpath: there is no {place}; or use --config-dir DIR")
    ours, theirs = _flat(composed.hydra), _plain_hydra()
    for key in sorted(ours.keys() | theirs.keys()):
        allowed = _below(key, FILLED_IN) or (swept and _below(key, OF_A_SWEEP))
        if allowed or ours.get(key) == theirs.get(key):
            continue
        typed = map(str, composed.hydra.overrides.hydra)
        word = next((text for text in typed if _sets(text, f"hydra.{key}")), f"hydra.{key}")
        if _below(key, OF_A_SWEEP):
            grid = composed.hydra.runtime.choices.get("sweep")
            word = f"sweep={grid}" if grid and _below(key, ("sweeper",)) else word
            raise ConfigError(f"{word} has an effect in a sweep only; add -m, or leave it out")
        part = next((part for part in INSTEAD if _below(key, (part,))), "")
        raise ConfigError(f"{word} has no effect here; {INSTEAD.get(part, 'leave it out')}")


def _sets(text: str, key: str) -> bool:
    """Tell whether an override is about a key, or about the group that it belongs to."""
    about = text.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")
    return _below(key, (about,)) or _below(about, (key,))


def _there(place: str) -> bool:
    scheme, colon, rest = place.rpartition("://")
    if scheme == "pkg":
        try:
            return importlib.util.find_spec(rest.replace("/", ".")) is not None
        except ImportError:
            return False
    return bool(colon and scheme != "file") or Path(rest).is_dir()


@cache
def _plain_hydra() -> dict[str, Any]:
    return _flat(compose_all([]).hydra)


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    """Return dotted key -> value, unresolved."""
    plain = OmegaConf.to_container(node) if isinstance(node, DictConfig) else node
    if not isinstance(plain, Mapping) or not plain:
        return {key: plain}
    flat: dict[str, Any] = {}
    for name, own in plain.items():
        flat |= _flat(own, f"{key}.{name!s}".strip("."))
    return flat


def _below(key: str, parts: tuple[str, ...]) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def _places(overrides: list[str]) -> list[str]:
    words = [parsed(text) for text in overrides]
    places = [word.value() for word in words if word.key_or_group == "hydra.searchpath"]
    return list(map(str, places[-1])) if places else []  # type: ignore[arg-type]


def experiment_part(composed: DictConfig) -> DictConfig:
    """Return a composed config without Hydra's own part."""
    copy = composed.copy()
    OmegaConf.set_struct(copy, False)
    OmegaConf.set_readonly(copy, False)
    for key in ("hydra", "experiment", "sweep"):
        copy.pop(key, None)
    return copy


def is_swept(text: str) -> bool:
    """Tell whether an override lists several values.  Raises ConfigError for what is none."""
    return bool(parsed(text).is_sweep_override())


def parsed(text: str) -> Override:
    """Read an override.  Raises ConfigError for what is none."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"'{text}' cannot be read as an override; write KEY=VALUE, with quotes around a value "
            f"that holds odd characters{_quoted(text)}"
        ) from error


def without_globs(overrides: list[str]) -> list[str]:
    """Return the overrides with the options of a group in place of a pattern.

    A star stands for names in one folder: `experiment=glob(linear/*)` takes those of
    `experiment/linear`.  Raises ConfigError for a pattern that nothing matches.
    """
    if not any(parsed(text).value_type == ValueType.GLOB_CHOICE_SWEEP for text in overrides):
        return overrides
    others = [text for text in overrides if not is_swept(text)]
    known = groups(_places(others))
    return [_without_glob(text, known) for text in overrides]


def _without_glob(text: str, known: dict[str, list[str]]) -> str:
    override = parsed(text)
    if override.value_type != ValueType.GLOB_CHOICE_SWEEP:
        return text
    group, pattern = override.key_or_group, override.value()
    if group not in known:
        raise ConfigError(f"{text}: glob() chooses options of a group; there are: {_list(known)}")
    # Hydra's own match takes a star for slashes too
    found = [
        option
        for option in known[group]
        if any(_same_depth(option, p) for p in pattern.include)  # type: ignore[union-attr]
        and pattern.filter([option])  # type: ignore[union-attr]
    ]
    if not found:
        raise ConfigError(f"{text}: no option matches; there are: {_list(known[group])}")
    return f"{override.get_key_element()}=choice({','.join(found)})"


def _same_depth(option: str, pattern: str) -> bool:
    return option.count("/") == pattern.count("/")


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)


def _or_one(text: str) -> str:
    simple = parsed(text).value_type == ValueType.SIMPLE_CHOICE_SWEEP
    return f" (where the comma is part of one value{_quoted(text)})" if simple else ""


def _quoted(text: str) -> str:
    """Return how a shell takes an override whose value is one text, where that can be read."""
    key, equals, value = text.partition("=")
    word = f'{key}="{value}"'
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return ""
    return f": {shlex.quote(word)}" if equals and value else ""


def _explain(error: Exception, overrides: list[str]) -> str:
    """Turn Hydra's several lines into one that says what is wrong and what there is instead."""
    text = str(error)
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
        return f"{mark.name}, line {mark.line + 1}: {error.problem}"
    if re.search(r"Could not (find|load) 'hydra/", text):
        return _explain_plugin(text)
    if match := re.search(r"Could not find '([^'/]+)/([^']*)'", text):
        return _explain_missing(match[1], match[2], overrides)
    match = re.search(r"Could not override '([^']+)'", text)
    if match and any(word.lstrip("+~").startswith(match[1]) for word in overrides):
        return _explain_key(match[1], overrides)
    if isinstance(error, ValueError):  # Hydra's own, for a group whose option is no word
        return _explain_option(error, overrides)
    return one_line(error)


def _explain_missing(group: str, option: str, overrides: list[str]) -> str:
    if instead := MOVED.get(f"{group}={option}"):
        return f"{group}={option} is now {instead}"
    options = groups(_places(overrides)).get(group, [])
    there = f"there are: {', '.join(options)}"
    if group in FAMILIES and ":" in option:
        there = f"a class of your own is {group}.name={option}"
    return f"{group}={option}: no such option{_near(option, options)}; {there}"


def _explain_plugin(text: str) -> str:
    missing = re.findall(r"hydra/\w+/\w+", text)[-1]
    group, _, option = missing.rpartition("/")
    if missing in EXTRAS:
        return f"{group}={option} is not installed; pip install 'claq-exp[{EXTRAS[missing]}]'"
    others = [known.rpartition("/")[2] for known in EXTRAS if known.startswith(group)]
    options = ["basic", *groups().get(group, []), *others]
    return (
        f"{group}={option}: no such option{_near(option, options)}; there are: {', '.join(options)}"
    )


def _explain_option(error: Exception, overrides: list[str]) -> str:
    known = groups()
    for override in overrides:
        group, _, option = override.partition("=")
        if group in known and option not in known[group]:
            return f"{override}: no such option; there are: {', '.join(known[group])}"
        if not group or group == "hydra":
            return f"'{override}' names no key; write GROUP=OPTION or GROUP.FIELD=VALUE"
    return f"{' '.join(overrides)}: {one_line(error)}"


def _explain_key(key: str, overrides: list[str]) -> str:
    if instead := MOVED.get(key):
        return f"{key} is now {instead}"
    others = [text for text in overrides if text.lstrip("+~").partition("=")[0] != key]
    composed = compose_all(others)
    node = composed if key.startswith("hydra.") else experiment_part(composed)
    *parents, wrong = key.split(".")
    for part in parents:
        child = OmegaConf.select(node, part)
        if not isinstance(child, DictConfig):
            wrong = part
            break
        node = child
    known = sorted(map(str, node))
    there = f"there are: {', '.join(known)}" if known else "there is nothing at its place"
    if any(text.startswith(f"{key.partition('.')[0]}.name=") and ":" in text for text in others):
        there = f"a field of your own class needs a plus: +{key}=..."
    return f"{key}: no such key{_near(wrong, known)}; {there}{_of_others(key)}"


def _of_others(key: str) -> str:
    """Return which options of a strategy's group have a field, if any."""
    group, _, name = key.partition(".")
    members = FAMILIES.get(group, {}).items()
    having = [option for option, rule in members if name in {f.name for f in fields(rule)}]
    return f"; it is a field of {group}={', '.join(having)}" if having else ""


def _near(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
