"""The words of a command line: overrides, and those of Hydra's flags that have an effect here."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from claq_exp.compose.seeds import lists_seeds, spread_seeds
from claq_exp.errors import ConfigError

INSTEAD = {  # flag of Hydra's -> the word that has its effect here
    ("--run", "-r"): "leave it out: without -m one experiment is run",
    ("--config-name", "-cn"): "write DIR/experiment/NAME.yaml; --config-dir DIR experiment=NAME",
    ("--config-path", "-cp"): "--config-dir DIR adds a folder of your own options",
    ("--experimental-rerun", "-er"): "the command of a run is in its results.json; type it again",
}
SHOWN = ("job", "hydra", "all")
INFORMED = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


@dataclass(frozen=True)
class Words:
    """A command line without its command.

    overrides: KEY=VALUE and the like.  folders: of the person's own options, the first before the
    others.  multirun: every combination of listed values.  printed: what Hydra is asked to print in
    place of a run, in its own words.  seeds: of the word `seeds=`, which `seed=` has replaced.
    verbose: show a line for each tensor.
    """

    overrides: list[str]
    folders: tuple[Path, ...] = ()
    multirun: bool = False
    printed: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    verbose: bool = False


class _Parser(argparse.ArgumentParser):
    """argparse, with errors as ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see claq-exp --help")


def read_words(arguments: list[str]) -> Words:
    """Tell flags from overrides.

    Raises ConfigError for a flag that there is not, and for one of Hydra's that has no effect here.
    """
    for flags, instead in INSTEAD.items():
        for word in arguments:
            if word.partition("=")[0] in flags:
                raise ConfigError(f"'{word}' has no effect here; {instead}")
    found, rest = _parser().parse_known_intermixed_args(arguments)
    if rest:
        raise ConfigError(f"'{rest[0]}' is no option; see claq-exp --help")
    printed = _printed(found)
    if printed and found.multirun:
        raise ConfigError(f"'{printed[0]}' prints and runs nothing; leave out -m")
    overrides, seeds = spread_seeds(found.overrides)
    if printed and len(seeds) > 1:
        word = next(filter(lists_seeds, found.overrides))
        raise ConfigError(f"'{word}' lists several values; choose one to print")
    if found.verbose and (printed or found.multirun or len(seeds) > 1):
        several = "-m" if found.multirun else "seeds="
        raise ConfigError(f"-v shows the tensors of one run; leave out {(*printed, several)[0]}")
    if not found.cfg and (found.resolve or found.package):
        raise ConfigError("--resolve and --package go with --cfg, e.g. --cfg job --package model")
    return Words(
        overrides,
        _folders(found),
        found.multirun or (len(seeds) > 1 and not printed),
        printed,
        seeds,
        found.verbose,
    )


def word_of(key: str, value: object) -> str:
    """Return the override that sets a key to a Python value: text and paths are quoted."""
    if not isinstance(value, str | Path):
        return f"{key}={json.dumps(value)}"
    escaped = re.sub(r'(\\*)("|\Z)', _escaped, str(value))
    return f'{key}="{escaped}"'


def _escaped(end: re.Match[str]) -> str:
    """Escape a quote, and the backslashes before a quote: Hydra takes all others as they are."""
    return 2 * end[1] + ('\\"' if end[2] else "")


def folders_of(arguments: list[str]) -> tuple[Path, ...]:
    """Return the folders of a person's own options, among any other words."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    _add_folders(parser)
    return _folders(parser.parse_known_args(arguments)[0])


def only_overrides(command: str, arguments: list[str]) -> Words:
    """Read the words of a command that is about one experiment.  Raises as `read_words`."""
    words = read_words(arguments)
    if words.printed:
        raise ConfigError(f"'{words.printed[0]}' goes with run: claq-exp run {words.printed[0]}")
    if words.verbose:
        raise ConfigError("-v goes with run: claq-exp run -v")
    if words.multirun:
        what = "give it one seed" if len(words.seeds) > 1 else "leave out -m"
        raise ConfigError(f"{command} takes one experiment; {what}")
    return words


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="claq-exp", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--verbose", "-v", action="store_true")
    _add_folders(parser)
    parser.add_argument("--cfg", "-c", choices=SHOWN)
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=INFORMED)
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--package", "-p")
    parser.add_argument("--hydra-help", action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    return parser


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-dir", "-cd", metavar="DIR", action="append", default=[])


def _folders(found: argparse.Namespace) -> tuple[Path, ...]:
    return tuple(Path(folder).expanduser().absolute() for folder in found.config_dir)


def _printed(found: argparse.Namespace) -> tuple[str, ...]:
    asked = {
        "--cfg": found.cfg,
        "--info": found.info,
        "--hydra-help": found.hydra_help,
        "--shell-completion": found.shell_completion,
    }
    flags = [flag for flag, value in asked.items() if value]
    if len(flags) > 1:
        raise ConfigError(f"{' and '.join(flags)} do not go together; choose one")
    words = [*flags, *(value for value in asked.values() if isinstance(value, str))]
    words += ["--resolve"] if found.resolve else []
    words += ["--package", found.package] if found.package else []
    return tuple(words)
