"""What the Hugging Face hub gives: files of a data set, and one line for what it does not give."""

from __future__ import annotations

from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from claq_exp.errors import SourceError, telling_line

PATTERN = "*?["  # any of these makes a name stand for several files


@cache
def data_set_files(name: str, files: str, revision: str | None) -> list[Path]:
    """Return local copies of one file of a data set, or of all that match a pattern.

    Files of the same revision that were fetched before are found without the hub.  The hub is asked
    once in a process, so that a run reads one commit.  Raises SourceError that says what to do.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if not set(files) & set(PATTERN):
            return [Path(hf_hub_download(name, files, repo_type="dataset", revision=revision))]
        folder = Path(
            snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=files)
        )
    except Exception as error:
        raise not_given("data set", name, error, files) from error
    found = [path for path in folder.rglob("*") if path.is_file()]
    matching = sorted(p for p in found if fnmatch(p.relative_to(folder).as_posix(), files))
    if not matching:
        raise SourceError(f"data set '{name}' has no file that matches '{files}'")
    return matching


def is_hub_name(name: str) -> bool:
    """Tell whether a model or data set of the hub can have a name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def not_given(kind: str, name: str, error: Exception, file: str = "") -> SourceError:
    """Return one line for a client library's error: what is missing, why, and what to do.

    kind: model or data set.  file: the one that was asked for.
    """
    instead = "a local folder as model.source" if kind == "model" else "a local file as path"
    return SourceError(f"{kind} '{name}' {_reason(kind, name, error, file)}; or give {instead}")


def _reason(kind: str, name: str, error: Exception, file: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'data set' else ''}{name}"
    said = telling_line(error)
    here = f" (and no folder of that name in {Path.cwd()})" if kind == "model" else ""
    if isinstance(error, GatedRepoError) or "is a gated dataset" in said:
        return f"is gated: accept its terms on {page} and log in with 'hf auth login'"
    if isinstance(error, RevisionNotFoundError) or said.startswith("Revision "):
        return f"has no such revision; see {page}"
    if isinstance(error, RepositoryNotFoundError) or "doesn't exist on the Hub" in said:
        advice = "check its name, or log in with 'hf auth login'"
        return f"is not on the hub{here}, or is private: {advice}"
    transport = "TransportError" in {kind.__name__ for kind in type(error).__mro__}  # of httpx
    if transport or isinstance(error, LocalEntryNotFoundError | ConnectionError):
        advice = "run 'claq-exp fetch' where it is within reach"
        away = f"the hub is out of reach{_cause(error)}"
        return f"is not wholly in the local cache{here}, and {away}: {advice}"
    if isinstance(error, EntryNotFoundError):
        return f"has no file '{file}'; see {page}"
    return f"cannot be loaded from the hub: {said}"


def _cause(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    said = telling_line(error)
    if isinstance(error, OfflineModeIsEnabled) or OfflineModeIsEnabled.__name__ in said:
        return " (HF_HUB_OFFLINE is set)"
    return "" if said.startswith("Couldn't reach") else f" ({said})"
