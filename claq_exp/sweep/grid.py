"""The jobs of a sweep, checked before the first one starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from claq_exp.compose import compose_all, experiment_part, is_swept
from claq_exp.config import ExperimentConfig, config_from_omegaconf
from claq_exp.errors import ConfigError

BASIC = "BasicSweeper"
ENGINES = ("launcher", "sweeper")


@dataclass(frozen=True)
class Grid:
    """A checked sweep.

    jobs: how many there will be.  base: the experiment without what the jobs change.  search: a
    sweeper decides on the jobs from the objectives of others.  fixed: keys that have one value in
    all jobs.
    """

    jobs: int
    base: ExperimentConfig
    search: bool
    fixed: frozenset[str]

    @property
    def results(self) -> Path:
        """The folder of the runs."""
        return Path(self.base.outputs).expanduser() / self.base.name


def check_grid(overrides: list[str]) -> Grid:
    """Compose and check every job of a grid; of a search, every value by itself.

    Raises ConfigError for the first job that cannot be run, and for one that asks for a launcher or
    sweeper of its own, which Hydra would ignore.
    """
    base = compose_all([text for text in overrides if not is_swept(text)])
    params = base.hydra.sweeper.get("params") or {}
    choices = _choices([*(f"{key}={value}" for key, value in params.items()), *overrides])
    search = not base.hydra.sweeper._target_.endswith(BASIC)
    jobs = list(_one_at_a_time(choices) if search else _combinations(choices))
    configs = [_checked(job, base) for job in jobs]
    if search and not configs[0].evaluation.corpora:
        raise ConfigError(
            "a search needs a perplexity to go by, and evaluation.corpora is empty; add a corpus"
        )
    count = base.hydra.sweeper.n_trials if search else len(set(map(tuple, jobs)))
    fixed = frozenset(key for key, values in choices.items() if len(values) == 1)
    return Grid(count, configs[0], search, fixed)


def _checked(job: list[str], base: DictConfig) -> ExperimentConfig:
    composed = compose_all(job)
    for engine in ENGINES:
        wanted, chosen = composed.hydra[engine], base.hydra[engine]
        if _plain(wanted) != _plain(chosen):
            culprit = " ".join(text for text in job if "/" not in text.partition("=")[0])
            raise ConfigError(
                f"the job {culprit} asks for another hydra/{engine} than its sweep; choose one for "
                f"the whole sweep on the command line, e.g. hydra/{engine}="
                f"{composed.hydra.runtime.choices[f'hydra/{engine}']}, and none in what is swept"
            )
    return config_from_omegaconf(experiment_part(composed))


def _plain(engine: DictConfig) -> object:
    values = OmegaConf.to_container(engine)
    assert isinstance(values, dict)
    return {key: value for key, value in values.items() if key != "params"}


def _choices(overrides: list[str]) -> dict[str, list[str]]:
    """Return key -> its overrides, the first of them in use; a later override replaces one."""
    parser = OverridesParser.create()
    choices: dict[str, list[str]] = {}
    for text in overrides:
        override = parser.parse_override(text)
        key = override.get_key_element()
        choices[key] = _values(key, override) if override.is_sweep_override() else [text]
    return {key: values for key, values in choices.items() if values}


def _values(key: str, override: Override) -> list[str]:
    """Return the values that a job may have: all, or both ends of an interval."""
    if override.is_discrete_sweep():
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    interval = override.value()
    return [f"{key}={end}" for end in (interval.start, interval.end)]  # type: ignore[union-attr]


def _combinations(choices: dict[str, list[str]]) -> Iterator[list[str]]:
    """Yield the overrides of every job."""
    return (list(job) for job in itertools.product(*choices.values()))


def _one_at_a_time(choices: dict[str, list[str]]) -> Iterator[list[str]]:
    """Yield jobs in which each value is there once, beside the first ones of the other keys."""
    first = {key: values[0] for key, values in choices.items()}
    yield list(first.values())
    for key, values in choices.items():
        for value in values[1:]:
            yield list({**first, key: value}.values())
