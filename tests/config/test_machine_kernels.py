"""Compiled loops that are older than their sources are compiled again."""

from __future__ import annotations

import os

from claq_exp.quantize import stale_kernels
from claq_exp.quantize.stale_kernels import drop_stale_kernels


def test_kernels_older_than_any_source_go_and_newer_ones_stay(tmp_path, monkeypatch):
    ages = {
        "quantize/codebook": {"clustering.py": 100, "affine.py": 50},
        "quantize/solver": {"compiled.py": 120},
        "number_formats": {"compiled.py": 130},
        "quantize/codebook/__pycache__": {
            "old.nbi": 70,
            "old.1.nbc": 60,
            "new.nbi": 40,
            "old.pyc": 90,
        },
        "quantize/solver/__pycache__": {
            "loop.nbi": 110,
            "calls_a_newer_fit.nbi": 60,
            "new.nbi": 30,
        },
        "number_formats/__pycache__": {"old.nbc": 55, "new.nbc": 45},
    }
    for folder, files in ages.items():
        (tmp_path / folder).mkdir(parents=True)
        for name, age in files.items():
            (tmp_path / folder / name).write_text("")
            os.utime(tmp_path / folder / name, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(stale_kernels, "PACKAGE", tmp_path)
    drop_stale_kernels()
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("__pycache__/*"))
    assert left == [
        "number_formats/__pycache__/new.nbc",
        "quantize/codebook/__pycache__/new.nbi",
        "quantize/codebook/__pycache__/old.pyc",
        "quantize/solver/__pycache__/new.nbi",
    ]
