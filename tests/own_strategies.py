"""The strategies that docs/ show, as files that a person would save."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from claq_exp.payload import PAYLOAD

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "architecture.md", DOCS / "strategies.md"]


def write_strategies(folder: Path) -> list[str]:
    """Write each example into the file that its first line names; return the modules' names."""
    text = "\n".join(page.read_text() for page in PAGES)
    blocks = re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", text, re.M | re.S)
    for name, code in blocks:
        (folder / f"{name}.py").write_text(code)
    return [name for name, _ in blocks]


def forget_strategies(names: Iterable[str]) -> None:
    """Undo what importing the examples has done."""
    PAYLOAD.pop("row_signs", None)
    for name in names:
        sys.modules.pop(name, None)
