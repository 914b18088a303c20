"""Every form that a version could store: matrices of the release that wrote them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from claq_exp.checkpoint.reader import read_layouts, read_weights

DATA = Path(__file__).parents[1] / "data"
# config.json, weights, and what was expected
FOLDERS = ["format_2_matrices", "format_3_matrices", "format_4_matrices", "format_4_later"]


@pytest.mark.case(69)
@pytest.mark.parametrize("folder", FOLDERS)
def test_old_matrices_have_the_numbers_that_they_had_to_the_bit(folder):
    expected = json.loads((DATA / folder / "expected.json").read_text())
    found = dict(read_weights(DATA / folder))
    assert set(found) == set(expected)
    for name, weight in found.items():
        dense = weight.dequantize().contiguous()
        digest = hashlib.sha256(dense.numpy().tobytes()).hexdigest()
        assert digest == expected[name]["sha256"], name
        assert weight.clamped() == expected[name]["clamped"], name


@pytest.mark.parametrize("folder", FOLDERS)
def test_old_matrices_cost_what_they_cost(folder):
    expected = json.loads((DATA / folder / "expected.json").read_text())
    for name, layout in read_layouts(DATA / folder).items():
        ledger = {account: bits for account, bits in layout.ledger().as_dict().items() if bits}
        assert ledger == expected[name]["ledger"], name
        assert layout.nominal_bits() == expected[name]["nominal"], name
