"""Where the configuration files are, in a source tree and in an installed package."""

from __future__ import annotations

from pathlib import Path

from claq_exp.errors import ClaqError


def packaged_folder(name: str) -> Path:
    """Return the folder `conf` or `sweeps`, beside the package in a source tree, else inside."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise ClaqError(f"the folder '{name}' of claq_exp is missing; install the package again")
