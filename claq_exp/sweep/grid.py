"""The jobs of a sweep, checked before the first one starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from hydra.core.override_parser.types import Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from claq_exp.compose.experiment import (
    check_hydra,
    compose_all,
    experiment_part,
    is_swept,
    parsed,
    without_globs,
)
from claq_exp.config import ExperimentConfig, config_from_omegaconf
from claq_exp.errors import ConfigError

BASIC = "BasicSweeper"
ENGINES = ("launcher", "sweeper")


@dataclass(frozen=True)
class Grid:
    """A checked sweep.

    jobs: how many there will be.  overrides: for Hydra, with options in place of patterns.
    configs: of all jobs, or of a search, experiments in which each value is there once.  search: a
    sweeper decides on the jobs from the objectives of others.  fixed: keys that have one value in
    all jobs.
    """

    jobs: int
    overrides: tuple[str, ...]
    configs: tuple[ExperimentConfig, ...]
    search: bool
    fixed: frozenset[str]

    @property
    def base(self) -> ExperimentConfig:
        """The first experiment."""
        return self.configs[0]


def check_grid(overrides: list[str]) -> Grid:
    """Compose and check every job of a grid; of a search, every value by itself.

    Raises ConfigError for the first job that cannot be run, and for one that asks for a launcher or
    sweeper of its own, which Hydra would ignore.
    """
    base = compose_all([text for text in overrides if not is_swept(text)])
    for engine in ENGINES:
        if base.hydra[engine] is None:
            raise ConfigError(f"a sweep needs a {engine}; choose one with hydra/{engine}=")
    check_hydra(base, swept=True)
    if base.hydra.mode is not None and base.hydra.mode.name != "MULTIRUN":
        raise ConfigError(f"hydra.mode={base.hydra.mode.name} has no effect with -m; leave out one")
    batch = base.hydra.sweeper.get("max_batch_size")
    if batch is not None and batch < 1:
        raise ConfigError(f"hydra.sweeper.max_batch_size is {batch}; give a positive whole number")
    params = base.hydra.sweeper.get("params") or {}
    own = without_globs([f"{key}={value}" for key, value in params.items()])
    words = without_globs(overrides)
    search = not base.hydra.sweeper._target_.endswith(BASIC)
    if not search:
        own, words = (list(map(_exact_steps, texts)) for texts in (own, words))
    choices = _choices([*own, *words], search=search)
    jobs = list(_one_at_a_time(choices) if search else _combinations(choices))
    fixed = frozenset(key for key, values in choices.items() if len(values) == 1)
    configs = tuple(_checked(job, base, fixed) for job in jobs)
    if search and not configs[0].evaluation.corpora:
        raise ConfigError(
            "a search needs a perplexity to go by, and evaluation.corpora is empty; add a corpus"
        )
    count = base.hydra.sweeper.n_trials if search else len(set(map(tuple, jobs)))
    keys = {parsed(text).get_key_element() for text in words}
    spelled = [text for text in own if parsed(text).get_key_element() not in keys]
    return Grid(count, (*spelled, *words), configs, search, fixed)


def _checked(job: list[str], base: DictConfig, fixed: frozenset[str]) -> ExperimentConfig:
    composed = compose_all(job)
    for engine in ENGINES:
        wanted, chosen = composed.hydra[engine], base.hydra[engine]
        if _plain(wanted) != _plain(chosen):
            culprit = " ".join(text for text in job if text.partition("=")[0] not in fixed)
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


def _choices(overrides: list[str], *, search: bool) -> dict[str, list[str]]:
    """Return key -> its overrides, the first of them in use; a later override replaces one."""
    choices: dict[str, list[str]] = {}
    for text in overrides:
        override = parsed(text)
        key = override.get_key_element()
        swept = override.is_sweep_override()
        choices[key] = _values(key, override, search=search) if swept else [text]
        if not choices[key]:
            raise ConfigError(f"'{text}' lists no value; nothing would be run")
    return choices


def _exact_steps(text: str) -> str:
    """Return a range of decimal numbers as a list; Hydra's own steps gather binary errors."""
    override = parsed(text)
    values = override.value()
    if not isinstance(values, RangeSweep):
        return text
    if not values.step:
        raise ConfigError(f"'{text}' has a step of 0")
    if isinstance(values.range(), range):
        return text
    start, stop, step = (Decimal(repr(n)) for n in (values.start, values.stop, values.step))
    count = max(0, math.ceil((stop - start) / step))
    listed = ",".join(str(float(start + step * i)) for i in range(count))
    shuffled = f"shuffle({listed})" if values.shuffle else f"choice({listed})"
    return f"{override.get_key_element()}={shuffled}" if listed else text


def _values(key: str, override: Override, *, search: bool) -> list[str]:
    """Return the values that a job may have: all, or both ends of an interval."""
    text = override.input_line
    if override.is_discrete_sweep():
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not search:
        raise ConfigError(
            f"'{text}': values between two ends are for a search (hydra/sweeper=optuna); list the "
            "values, or write range(FROM,TO,STEP)"
        )
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


def check_draws(configs: Sequence[ExperimentConfig]) -> None:
    """Raise ConfigError where runs differ in `seed` alone, so that all of them are one draw."""
    seeds: dict[str, set[int]] = {}
    for config in configs:
        seeds.setdefault(repr(replace(config, seed=0)), set()).add(config.seed)
    if any(len(own) > 1 for own in seeds.values()):
        raise ConfigError(
            "seeds= would run one draw several times, for no rule follows seed; leave out "
            "calibration.seed=, whose default follows it"
        )
