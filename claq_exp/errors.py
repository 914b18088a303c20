"""The errors that a person can meet: each message says what is wrong, where, and what to change."""


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


def first_line(error: BaseException) -> str:
    """Return the first line of somebody else's message, or the error itself where it has none."""
    return str(error).strip().partition("\n")[0] or repr(error)
