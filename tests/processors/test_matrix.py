"""What the matrix of processors would run is there."""

from __future__ import annotations

from matrix import COMBINATIONS, sensitive


def test_the_sensitive_files_are_there_and_every_setting_has_a_name():
    assert len(sensitive()) == len({*sensitive()}) > 30
    assert all(all(value for value in chosen.values()) for chosen in COMBINATIONS.values())
