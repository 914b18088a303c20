"""What a path that a person gave stands for, and what is wrong with it."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from claq_exp.errors import ConfigError
from claq_exp.sources.content import JSON, PACKED, PLAIN, suffix_of
from claq_exp.sources.hub import PATTERN
from claq_exp.sources.tables import TABLES

LISTED = 6  # kinds of files in a message
LOOKED_AT = 10_000  # files below a folder
KINDS = (*TABLES, *JSON, PLAIN)  # of files that hold texts
DESCRIPTIONS = ("dataset_info.json", "state.json", "dataset_dict.json", "config.json")
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)")
WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def looks_like_path(source: str) -> bool:
    """Tell whether a name cannot be meant for the hub: it is there, or has the form of a path."""
    if WINDOWS.match(source) or ADDRESS.match(source):
        return True
    try:
        path = Path(source).expanduser()
        there = path.exists() or path.is_symlink()
    except (OSError, RuntimeError, ValueError):
        there = False
    return there or source.startswith(("/", ".", "~"))


def local_path(given: str, what: str) -> Path:
    """Return the path of a file or folder that is there.

    given: as a person wrote it; `~` is the home folder.  what: the name of the thing in messages.
    Raises ConfigError that says why nothing is there.
    """
    if address := ADDRESS.match(given):
        raise ConfigError(f"{what} '{given}' is an address; {_in_place_of(*address.groups())}")
    try:
        path = Path(given).expanduser()
        if path.exists():
            return path
        raise ConfigError(f"{what} '{given}' {_absence(given, path)}")
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, ~nobody, a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{what} {given!r} cannot be looked at: {reason}") from error


def files_below(folder: Path, files: str | None) -> list[Path]:
    """Return the files below a folder that match a name or pattern, in order of their names.

    Raises ConfigError that says what the folder holds where there is no pattern, or no such file.
    """
    if files is None:
        raise ConfigError(
            f"'{folder}' is a folder, with {_held(folder)}; give one file, or which of them as "
            f"files, e.g. files={_example(folder)}"
        )
    if found := sorted(name for name in _walked(folder) if fnmatch(name, files)):
        return [folder / name for name in found]
    raise ConfigError(
        f"folder '{folder}' has no file that matches files={files}, but {_held(folder)}; take e.g. "
        f"files={_example(folder)}"
    )


def _walked(folder: Path) -> Iterator[str]:
    """Give the files below a folder, relative to it, without hidden ones."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                yield Path(place, name).relative_to(folder).as_posix()


def _names(folder: Path) -> list[str]:
    """Return files below a folder, not all of very many."""
    return sorted(islice(_walked(folder), LOOKED_AT))


def _held(folder: Path) -> str:
    """Say how many files of which kind are below a folder."""
    kinds = Counter(Path(name).suffix.lower() or "without suffix" for name in _names(folder))
    if not kinds:
        return "no files"
    shown = [f"{count:,} {kind}" for kind, count in kinds.most_common(LISTED)]
    return ", ".join(shown) + (" and others" if len(kinds) > LISTED else "")


def _example(folder: Path) -> str:
    """Return a pattern for the first files that can be texts; data sets are tables more often."""
    names = _names(folder)
    for kind in KINDS:
        for name in names:
            if suffix_of(name) == kind and Path(name).name not in DESCRIPTIONS:
                parent, ends = Path(name).parent.as_posix(), Path(name).suffixes
                ending = "".join(ends[-2:] if ends[-1].lower() in PACKED else ends[-1:])
                return f"{'' if parent == '.' else f'{parent}/'}*{ending}"
    return "*.txt"


def _absence(given: str, path: Path) -> str:
    """Say why a path is not there."""
    if path.is_symlink():
        return f"is a link to '{path.readlink()}', which does not exist"
    if given != given.strip() and Path(given.strip()).expanduser().exists():
        return "has a space at its end or start; without it, it exists"
    if WINDOWS.match(given):
        return "is a path of Windows; give it as this system names it"
    missing = f"does not exist (looked in {Path.cwd()})"
    if set(PATTERN) & set(given):
        return f"{missing}; for several files give their folder as path, and the pattern as files"
    near = next(folder for folder in path.absolute().parents if folder.exists())
    if not near.is_dir():
        return f"does not exist: {near} is a file"
    wanted = path.absolute().relative_to(near).parts[0]
    similar = difflib.get_close_matches(wanted, [other.name for other in near.iterdir()], 1)
    return f"{missing}; in {near} there is '{similar[0]}'" if similar else missing


def _in_place_of(scheme: str, rest: str) -> str:
    if scheme == "file":
        return f"give the path alone: /{rest.lstrip('/')}"
    if scheme == "wheel":
        return "give it as source, with its sha256"
    if rest.startswith("huggingface.co/"):
        parts = rest.removeprefix("huggingface.co/").removeprefix("datasets/").split("/")
        return f"give its name on the hub as source: {'/'.join(parts[:2])}"
    return "fetch the file, and give its path"
