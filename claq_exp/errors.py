"""The errors that a person can meet: each message says what is wrong, where, and what to change."""

from __future__ import annotations

import re
from typing import Any

MOST_CHARACTERS, MOST_LINES = 500, 5  # of somebody else's message
_NOISE = re.compile(r"For further information visit|full_key: |object_type=|reference_type=|[~^]+$")
_TAIL = re.compile(r" \[type=\w+, input_value=.*\]$|\.?\s*\(Request ID: [^)]*\)")
_REASON = re.compile(r"WeightsUnpickler error: ")  # of torch.load, far below its advice
_HEADLINE = re.compile(  # says that something is wrong and not what
    r":$"
    r"|^\d+ validation errors? for [^:]+(: [\w.\[\]]+)?$"
    r"|^Error merging override [^:]*$"
    r"|^[45]\d\d (Client|Server) Error[^:]*$"
    r"|^An (error|exception) (occurred|happened) while [^:]*$"
)


class ClaqError(Exception):
    """A failed run; the command line prints its message as one line and exits with `exit_code`."""

    exit_code = 1


class ConfigError(ClaqError):
    """A request that cannot be carried out as written."""

    exit_code = 2


class SourceError(ClaqError):
    """A model, text or task file that could not be brought here or is not what was pinned."""


class CalibrationError(ClaqError):
    """Calibration inputs that cannot be used, e.g. NaN in an activation."""


class NumericalError(ClaqError):
    """A weight or Hessian that no stated rule can handle."""


class CheckpointError(ClaqError):
    """A checkpoint or run folder whose content does not agree with itself."""


def one_of(what: str, value: object, known: object) -> str:
    """Return the sentence that names the alternatives of a wrong choice."""
    return f"{what} '{value}' is not known; choose one of: {', '.join(sorted(map(str, known)))}"  # type: ignore[call-overload]


def check_positive(where: str, config: Any, *names: str) -> None:
    """Raise ConfigError where a field of a config is there and below 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            key = f"{where}.{name}".lstrip(".")
            raise ConfigError(f"{key} is {value}; give a positive whole number")


def check_whole(key: str, value: int | str, least: int, word: str) -> None:
    """Raise ConfigError unless a value is a whole number from `least`, or the word."""
    if value != word and (not isinstance(value, int) or value < least):
        raise ConfigError(f"{key} is {value}; give a whole number from {least}, or {word}")


def check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError, with the alternatives, for a value that is not known."""
    if value not in known:
        raise ConfigError(one_of(key, value, known))


def telling_line(error: BaseException) -> str:
    """Return what somebody else's error says, on one line and without what says nothing.

    Libraries begin with a headline ("1 validation error for Settings") and put the reason below it,
    or into the error's cause.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    lines = [_TAIL.sub("", line) for line in lines if line and not _NOISE.match(line)]
    if not lines:
        return repr(error)
    chosen = next((line for line in lines if _REASON.match(line)), "")
    if not chosen:
        chosen = lines[0]
        for line in lines[1:MOST_LINES]:
            if not _HEADLINE.search(chosen):
                break
            chosen = f"{chosen.rstrip(':')}: {line}"
        if _HEADLINE.search(chosen) and error.__cause__ is not None:
            chosen = f"{chosen.rstrip(':')}: {telling_line(error.__cause__)}"
    if isinstance(error, KeyError):  # whose text is nothing but the key
        chosen = f"{type(error).__name__}: {chosen}"
    return chosen if len(chosen) <= MOST_CHARACTERS else f"{chosen[:MOST_CHARACTERS]} ..."


def one_line(error: Exception) -> str:
    """Return OmegaConf's or Hydra's message as one line that names the key."""
    found = re.search(r"^ *full_key: (.+)$", str(error), re.MULTILINE)
    key, message = found[1] if found else "", telling_line(error)
    return f"{key}: {message}" if key and key not in message else message
