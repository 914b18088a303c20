"""Compiled loops that are older than their sources are compiled again."""

from __future__ import annotations

import os
from types import SimpleNamespace

import claq_exp.quantize.codebook
from claq_exp.machine import drop_stale_kernels


def test_kernels_older_than_any_source_go_and_newer_ones_stay(tmp_path, monkeypatch):
    ages = {
        "codebook": {"clustering.py": 100, "affine.py": 50},
        "solver": {"compiled.py": 120},
        "codebook/__pycache__": {"old.nbi": 70, "old.1.nbc": 60, "new.nbi": 40, "old.pyc": 90},
        "solver/__pycache__": {"loop.nbi": 110, "calls_a_newer_fit.nbi": 60, "new.nbi": 30},
    }
    for folder, files in ages.items():
        (tmp_path / folder).mkdir()
        for name, age in files.items():
            (tmp_path / folder / name).write_text("")
            os.utime(tmp_path / folder / name, (1e9 - age, 1e9 - age))
    for package in ("codebook", "solver"):
        module = SimpleNamespace(__file__=str(tmp_path / package / "__init__.py"))
        monkeypatch.setattr(claq_exp.quantize, package, module)
    drop_stale_kernels()
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*/*"))
    assert left == [
        "codebook/__pycache__/new.nbi",
        "codebook/__pycache__/old.pyc",
        "solver/__pycache__/new.nbi",
    ]
