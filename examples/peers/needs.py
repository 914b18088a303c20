"""What a script says where a package that it needs is missing."""

from __future__ import annotations

import sys


def missing(error: ModuleNotFoundError, command: str) -> int:
    """Print one line with pip's command; return the exit status of a wrong request."""
    module = (error.name or "?").partition(".")[0]
    print(
        f"{sys.argv[0]}: the package with '{module}' is not installed: {command}", file=sys.stderr
    )
    return 2
