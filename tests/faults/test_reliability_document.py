"""docs/reliability.md says of every fault what happens, and tells the tested ones truly."""

from __future__ import annotations

import pytest
from reliability_table import DOCUMENT, TESTS, faults, marked_tests, rendered

HOW = "run python tests/faults/reliability_table.py"


@pytest.fixture(scope="module")
def document() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


def test_the_list_has_every_fault_once_and_in_order(document):
    assert [number for _, number, _, _ in faults(document)] == list(range(1, 151))


def test_what_is_called_tested_is_what_the_tests_are_marked_with(document):
    said = {number for _, number, _, tested in faults(document) if tested}
    assert said == set(marked_tests()), HOW


def test_nearly_all_faults_are_tested():
    assert len(marked_tests()) >= 146


def test_the_table_has_the_counts_of_the_markers(document):
    assert rendered(document, marked_tests()) == document, HOW


def test_markers_of_modules_classes_and_functions_are_found(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "pytestmark = [pytest.mark.slow, pytest.mark.case(3)]\n"
        "@pytest.mark.case(5)\n"
        "class TestIt:\n"
        "    @pytest.mark.case(7, 8)\n"
        "    def test_inside(self): ...\n"
        "def test_outside(): ...\n"
        "def helper(): ...\n"
    )
    inside, outside = "test_some.py::test_inside", "test_some.py::test_outside"
    assert marked_tests(tmp_path) == {
        3: {inside, outside},
        **{number: {inside} for number in (5, 7, 8)},
    }


def test_a_fault_that_loses_its_test_is_called_untested(document):
    fewer = {number: tests for number, tests in marked_tests(TESTS).items() if number != 72}
    changed = rendered(document, fewer)
    assert [tested for _, number, _, tested in faults(changed) if number == 72] == [False]
    assert rendered(changed, marked_tests()) == document
