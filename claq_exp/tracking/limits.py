"""Where metrics go, and what Weights & Biases takes for a name: it fails when a run starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from claq_exp.errors import ConfigError, check_choice

NAME, TAG = 128, 64  # characters of a project or group, and of a tag
NOT_IN_PROJECTS = "/\\#?%:"


@dataclass
class TrackingConfig:
    """Where metrics go besides the run folder.

    name: none or wandb.  mode: offline, online or disabled (wandb).  project, group, tags: wandb's
    own, within its limits.
    """

    name: str = "none"
    mode: str = "offline"
    project: str = "claq_exp"
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choice("tracking.name", self.name, ("none", "wandb"))
        check_choice("tracking.mode", self.mode, ("offline", "online", "disabled"))
        check_project("tracking.project", self.project)
        check_group_and_tags(self.group, self.tags)


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
