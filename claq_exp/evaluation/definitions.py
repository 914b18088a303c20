"""lm-eval's own task definitions: which file defines a name, and what a definition is made of."""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import logging
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from claq_exp.errors import ConfigError, telling_line

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

TASK = re.compile(r"""^["']?task["']?:[ \t]*["']?([^\s"'#\[]+)["']?[ \t]*(?:#.*)?$""", re.MULTILINE)


def task_file(name: str) -> Path | None:
    """Return the YAML file of a single task, or None where the name is a group, a tag or unknown.

    Raises ConfigError without lm-eval.
    """
    return _task_files().get(name)


def check_name(name: str) -> None:
    """Raise ConfigError, with similar names, for what is no task, group or tag of lm-eval."""
    if task_file(name) is not None:
        return
    known = all_tasks().all_tasks
    if name not in known:
        near = difflib.get_close_matches(name, known, n=6, cutoff=0.6)
        raise ConfigError(
            f"evaluation.zero_shot: lm-eval has no task '{name}'; "
            f"similar: {', '.join(near) or 'none'}"
        )


@lru_cache(maxsize=1)
def all_tasks() -> TaskManager:
    """Return lm-eval's index of all names; it takes seconds, and only groups and tags need it."""
    quiet()
    from lm_eval.tasks import TaskManager

    return TaskManager()


def definition_content(name: str, members: Iterable[str] = ()) -> str:
    """Return a hash of lm-eval's version and of all files that define a task.

    Those are its YAML file, what this includes, and the Python files beside them; for a group, the
    same for its `members` (tasks and groups) too.
    """
    index = all_tasks().task_index if members else {}
    files: set[Path] = set()
    for member in (name, *members):
        path = task_file(member) or (index[member].yaml_path if member in index else None)
        if path is not None:
            _add_includes(path.resolve(), files)
    files |= {source for path in list(files) for source in path.parent.glob("*.py")}
    folder = _tasks_folder().resolve()
    digest = hashlib.sha256(importlib.metadata.version("lm-eval").encode())
    for path in sorted(files):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def quiet() -> None:
    """Keep lm-eval's warnings about its own defaults away."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _tasks_folder() -> Path:
    try:
        import lm_eval.tasks
    except Exception as error:
        raise ConfigError(
            f"evaluation.zero_shot needs lm-eval, which cannot be imported ({telling_line(error)})"
            "; pip install lm-eval, or use evaluation=perplexity"
        ) from error
    return Path(lm_eval.tasks.__file__).parent


@lru_cache(maxsize=1)
def _task_files() -> dict[str, Path]:
    """Index single tasks by the line `task: NAME`; of two files, lm-eval takes the first.

    Many times faster than lm-eval's own index, which parses every file and all that it includes.
    """
    files: dict[str, Path] = {}
    for path in sorted(_tasks_folder().rglob("*.yaml"), key=lambda path: path.as_posix()):
        for match in TASK.finditer(path.read_text(encoding="utf-8")):
            files.setdefault(match[1], path)
    return files


def _add_includes(path: Path, files: set[Path]) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    if path in files:
        return
    files.add(path)
    includes = load_yaml(path, resolve_func=False, recursive=False).get("include", [])
    for include in includes if isinstance(includes, list) else [includes]:
        _add_includes((path.parent / include).resolve(), files)
