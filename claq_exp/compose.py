"""From words on the command line to a checked config, with Hydra's composition."""

from __future__ import annotations

import difflib
import re
from functools import cache

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from claq_exp.config import ExperimentConfig, config_from_omegaconf, one_line
from claq_exp.errors import ConfigError
from claq_exp.places import packaged_folder

VERSION_BASE = "1.3"
PRIMARY = "config"
LAUNCHER = "hydra/launcher"
EXTRAS = {  # option of Hydra's that a package brings -> our extra with that package
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/ray": "ray",
    "hydra/sweeper/optuna": "optuna",
}


@cache
def register_sweeps() -> None:
    """Make every file of `sweeps/` an option of the group `sweep`, once in a process."""
    store = ConfigStore.instance()
    for path in sorted(packaged_folder("sweeps").glob("*.yaml")):
        node = OmegaConf.load(path)
        store.store(group="sweep", name=path.stem, node=node, package="_global_")


def compose_config(overrides: list[str]) -> ExperimentConfig:
    """Compose and check one experiment.

    Raises ConfigError with one line that names the alternatives.
    """
    if several := [text for text in overrides if is_swept(text)]:
        raise ConfigError(f"'{several[0]}' lists several values; add -m to run each of them")
    return config_from_omegaconf(experiment_part(compose_all(overrides)))


def check_words(overrides: list[str]) -> None:
    """Raise ConfigError unless the overrides compose; their values are not looked at."""
    compose_all([text for text in overrides if not is_swept(text)])


def is_multirun(overrides: list[str]) -> bool:
    """Tell whether the overrides name a sweep by themselves."""
    mode = compose_all([text for text in overrides if not is_swept(text)]).hydra.mode
    return mode is not None and mode.name == "MULTIRUN"


def groups() -> dict[str, list[str]]:
    """Return config group -> its options."""
    conf = packaged_folder("conf")
    folders = [folder for folder in conf.iterdir() if folder.is_dir() and folder.name != "hydra"]
    found = {
        folder.relative_to(conf).as_posix(): sorted(
            path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")
        )
        for folder in [*sorted(folders), conf / LAUNCHER]
    }
    found["sweep"] = sorted(path.stem for path in packaged_folder("sweeps").glob("*.yaml"))
    return found


def compose_all(overrides: list[str]) -> DictConfig:
    """Compose an experiment with Hydra's own part, unchecked.

    Raises ConfigError with one line that names the alternatives.
    """
    register_sweeps()
    GlobalHydra.instance().clear()
    conf = str(packaged_folder("conf"))
    try:
        with initialize_config_dir(version_base=VERSION_BASE, config_dir=conf):
            return compose(PRIMARY, overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error, overrides)) from error


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
    try:
        return bool(OverridesParser.create().parse_override(text).is_sweep_override())
    except HydraException as error:
        match = re.fullmatch(r"([\w.@+]+)=([^\[{'][^']*)", text)
        shell = f": for a shell \"{match[1]}='{match[2]}'\"" if match else ""
        raise ConfigError(
            f"'{text}' cannot be read as an override; write KEY=VALUE, with quotes around a value "
            f"that holds odd characters{shell}"
        ) from error


def _explain(error: Exception, overrides: list[str]) -> str:
    """Turn Hydra's several lines into one that says what is wrong and what there is instead."""
    text = str(error)
    if isinstance(error, ValueError):  # Hydra's own, for a group whose option is no word
        return _explain_option(overrides)
    if re.search(r"Could not (find|load) 'hydra/", text):
        return _explain_plugin(text)
    if match := re.search(r"Could not find '([^'/]+)/([^']+)'", text):
        options = groups().get(match[1], [])
        there = f"there are: {', '.join(options)}"
        return f"{match[1]}={match[2]}: no such option{_near(match[2], options)}; {there}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return _explain_key(match[1], overrides)
    return one_line(error)


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


def _explain_option(overrides: list[str]) -> str:
    known = groups()
    for override in overrides:
        group, _, option = override.partition("=")
        if group in known and option not in known[group]:
            return f"{override}: no such option; there are: {', '.join(known[group])}"
    return f"these overrides do not go together: {' '.join(overrides)}"


def _explain_key(key: str, overrides: list[str]) -> str:
    others = [text for text in overrides if text.lstrip("+~").partition("=")[0] != key]
    node = experiment_part(compose_all(others))
    *parents, wrong = key.split(".")
    for part in parents:
        child = OmegaConf.select(node, part)
        if not isinstance(child, DictConfig):
            wrong = part
            break
        node = child
    known = sorted(map(str, node))
    there = f"there are: {', '.join(known)}" if known else "there is nothing at its place"
    return f"{key}: no such key{_near(wrong, known)}; {there}"


def _near(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
