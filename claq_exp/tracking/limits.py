"""What Weights & Biases takes for a name; checked before a run, for it fails when it starts."""

from __future__ import annotations

from collections.abc import Sequence

from claq_exp.errors import ConfigError

NAME, TAG = 128, 64  # characters of a project or group, and of a tag
NOT_IN_PROJECTS = "/\\#?%:"


def check_project(key: str, project: str) -> None:
    """Raise ConfigError for what cannot name a project."""
    _check_length(key, project, NAME)
    if found := sorted(set(project) & set(NOT_IN_PROJECTS)):
        raise ConfigError(
            f"{key} '{project}' holds {' '.join(found)}; the name of a project of Weights & Biases "
            f"has none of {' '.join(NOT_IN_PROJECTS)}"
        )


def check_group_and_tags(group: str | None, tags: Sequence[str]) -> None:
    """Raise ConfigError for what cannot name a group, or be a tag."""
    if group is not None:
        _check_length("tracking.group", group, NAME)
    for tag in tags:
        _check_length("tracking.tags: tag", tag, TAG)


def _check_length(what: str, value: str, most: int) -> None:
    if not 1 <= len(value) <= most:
        raise ConfigError(
            f"{what} '{value}' has {len(value)} characters; Weights & Biases takes 1 to {most}"
        )
