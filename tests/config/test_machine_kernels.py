"""Compiled loops that are older than their sources are compiled again."""

from __future__ import annotations

import os
from types import SimpleNamespace

import claq_exp.quantize.codebook
from claq_exp.machine import drop_stale_kernels


def test_kernels_older_than_any_source_go_and_newer_ones_stay(tmp_path, monkeypatch):
    cache = tmp_path / "__pycache__"
    cache.mkdir()
    for name, age in (("block.py", 100), ("affine.py", 50)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    for name, age in (("old.nbi", 70), ("old.1.nbc", 60), ("new.nbi", 40), ("old.pyc", 90)):
        (cache / name).write_text("")
        os.utime(cache / name, (1e9 - age, 1e9 - age))
    codebook = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(claq_exp.quantize, "codebook", codebook)
    drop_stale_kernels()
    assert sorted(path.name for path in cache.iterdir()) == ["new.nbi", "old.pyc"]
