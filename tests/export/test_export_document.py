"""docs/export.md says what there is."""

from __future__ import annotations

import re
from pathlib import Path

from claq_exp.cli import USAGE
from claq_exp.export import FORMATS

DOCUMENT = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")


def test_every_format_is_a_row_with_its_dtypes():
    rows = re.findall(r"^\| `([a-z-]+)` \| .* \| (`[^|]+) \|$", DOCUMENT, re.M)
    assert {name: tuple(re.findall(r"\w+", dtypes)) for name, dtypes in rows} == {
        name: found.dtypes for name, found in FORMATS.items()
    }
    assert all(name in USAGE for name in FORMATS)
