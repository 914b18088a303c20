"""Print a pin for each dependency of pyproject.toml: the lowest version that it allows.

Extras are included but for `ray`, which needs an environment of its own (docs/sweeps.md).
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

APART = ("ray",)


def pins(project: dict) -> list[str]:
    """Return NAME==VERSION of every requirement with a lower bound; environment markers stay."""
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"]]
    lines += [line for name, own in extras.items() if name not in APART for line in own]
    found = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", requirement)[0]
        bound = re.search(r">=\s*([\w.]+)", requirement)
        if bound:
            found[name] = f"{name}=={bound[1]}" + (f"; {marker.strip()}" if marker else "")
    return sorted(found.values())


if __name__ == "__main__":
    path = Path(__file__).parents[1] / "pyproject.toml"
    sys.stdout.write("\n".join(pins(tomllib.loads(path.read_text())["project"])) + "\n")
