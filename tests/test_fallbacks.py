"""What is counted, told and refused of layers that were not quantized as asked."""

from __future__ import annotations

import pytest

from claq_exp.errors import NumericalError
from claq_exp.run_folder.fallbacks import (
    FALLBACKS,
    count_fallbacks,
    fallback_notes,
    refuse_fallbacks,
)
from claq_exp.run_folder.layers import LAYER_FIELDS

WELL = {
    "name": "model.layers.0.q_proj",
    "cols": 48,
    "raised_damping": None,
    "dead_columns": 0,
    "nearest": None,
    "clamped": None,
    "unconverged": None,
    "retreats": None,
    "tokens": 500,
}
CHANGES = {
    "layers_indefinite": {"nearest": "indefinite"},
    "layers_unfed": {"nearest": "unfed"},
    "more_damping": {"raised_damping": 0.1},
    "layers_with_dead_columns": {"dead_columns": 3},
    "layers_with_few_tokens": {"tokens": 47},
    "layers_clamped": {"clamped": 2},
    "layers_unconverged": {"unconverged": 1},
    "layers_with_retreats": {"retreats": 1},
}


def test_a_layer_that_went_well_has_no_fallback():
    assert not any(count_fallbacks([WELL]).values())
    assert fallback_notes(count_fallbacks([WELL])) == []
    refuse_fallbacks(WELL)


def test_ends_that_stay_in_16_bits_are_told_and_count_no_layer():
    counts = count_fallbacks([WELL], "the head is odd; it stays")
    assert counts["layers"] == 0
    assert fallback_notes(counts) == ["the head is odd; it stays"]


@pytest.mark.parametrize("kind", FALLBACKS, ids=lambda kind: kind.key)
def test_each_kind_is_counted_told_and_refused_by_the_layers_name(kind):
    row = WELL | CHANGES[kind.key]
    counts = count_fallbacks([WELL, row, row, WELL])
    assert {key: count for key, count in counts.items() if count} == {"layers": 2, kind.key: 2}
    (note,) = fallback_notes(counts)
    assert note.startswith(f"2 layers {kind.words} ({kind.column} in layers.csv)")
    (note,) = fallback_notes(count_fallbacks([row]))
    assert note.startswith("1 layer ")
    assert kind.column in LAYER_FIELDS
    if kind.lossy:
        with pytest.raises(NumericalError) as caught:
            refuse_fallbacks(row)
        assert str(caught.value).startswith("model.layers.0.q_proj: strict=true, and this layer")
        assert f"({kind.column}: {row[kind.column]})" in str(caught.value)
    else:
        refuse_fallbacks(row)


def test_a_layer_with_two_kinds_counts_once_and_shows_in_both():
    counts = count_fallbacks([WELL | {"tokens": 0, "dead_columns": 48, "nearest": "unfed"}])
    happened = {key: count for key, count in counts.items() if count}
    assert happened == {
        "layers": 1,
        "layers_unfed": 1,
        "layers_with_dead_columns": 1,
        "layers_with_few_tokens": 1,
    }
    assert len(fallback_notes(counts)) == 3


def test_results_of_older_versions_have_fewer_counts():
    assert fallback_notes({}) == []
    (note,) = fallback_notes({"more_damping": 0, "layers_with_few_tokens": 1_234})
    assert note.startswith("1,234 layers saw fewer calibration tokens")
