"""The same run gives the same bytes, whatever its process has done before."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys

import pytest
from numba.core.dispatcher import Dispatcher

import claq_exp.quantize

HARMLESS = {"nnan", "ninf", "nsz"}  # these allow no other order and no other rounding

# What a fit needs, of many columns: differences in a last bit move a value to another bin in a few.
FITS = """
import hashlib
import numpy as np
from claq_exp.quantize.codebook.clustering import bin_values, fit_levels
from claq_exp.quantize.solver.compiled import compensate
generator = np.random.default_rng(0)
columns = generator.standard_t(5, size=(20000, 200)).astype(np.float32)
weights, levels = np.ones(200, dtype=np.float32), np.zeros(16)
fit_levels(columns[0], weights, levels)
found = hashlib.sha256()
for column in columns:
    mass, moment, _, _ = bin_values(column, weights, 16)
    found.update(mass.tobytes() + moment.tobytes())
factor, errors = generator.normal(size=(64, 64)).astype(np.float32), columns[:64].copy()
for position in range(64):
    compensate(errors, factor, position)
found.update(errors.tobytes())
print(found.hexdigest())
"""


def outputs(script: str, *environments: dict[str, str]) -> list[str]:
    """What a script prints in each environment, side by side."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]
    told = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started)
    return told


@pytest.mark.case(40)
def test_fits_are_the_same_compiled_or_loaded_and_for_any_processor(tmp_path):
    own = {"NUMBA_CACHE_DIR": str(tmp_path / "own")}
    plainest = {"NUMBA_CACHE_DIR": str(tmp_path / "generic"), "NUMBA_CPU_NAME": "generic"}
    first, other = outputs(FITS, own, plainest)
    assert any((tmp_path / "own").rglob("*.nbc"))
    assert len(first.strip()) == 64
    assert other == first
    assert outputs(FITS, own) == [first]


@pytest.mark.case(40)
def test_no_compiler_may_choose_the_order_of_sums():
    seen = 0
    for found in pkgutil.walk_packages(claq_exp.quantize.__path__, "claq_exp.quantize."):
        for name, value in vars(importlib.import_module(found.name)).items():
            if isinstance(value, Dispatcher):
                flags = value.targetoptions.get("fastmath", False)
                assert flags is not True, name
                assert set(flags or ()) <= HARMLESS, name
                seen += 1
    assert seen > 10
