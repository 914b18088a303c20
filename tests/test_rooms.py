"""The folders of the package import each other in one direction.

A room is a folder of the package, or a module beside it.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

from claq_exp.sources.code import PACKAGE, import_graph, package_files

FOLDERS = ["claq_exp", "claq_exp.quantize", "claq_exp.runtime"]
ROOT = {"__init__", "__main__", "config", "errors"}  # modules beside the rooms


def rooms(folder: str) -> dict[tuple[str, str], list[str]]:
    """Room and room that it imports -> the imports, as `module -> module`."""
    found = defaultdict(list)
    for name, imported in import_graph(package_files(PACKAGE)).items():
        for other in imported:
            pair = room(folder, name), room(folder, other)
            if all(pair) and pair[0] != pair[1]:
                found[pair].append(f"{name} -> {other}")
    return found


def room(folder: str, module: str) -> str:
    """The room of a folder that a module is in; none for the folder's own __init__.py."""
    return module.removeprefix(f"{folder}.").split(".")[0] if f"{folder}." in module else ""


def circles(pairs: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs that lie on a circle: what is left when no room can be taken off any more."""
    left = set(pairs)
    while True:
        importing, imported = {a for a, _ in left}, {b for _, b in left}
        inner = {(a, b) for a, b in left if a in imported and b in importing}
        if inner == left:
            return sorted(left)
        left = inner


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_each_other_in_one_direction(folder):
    found = rooms(folder)
    lines = [f"{a} imports {b}: {found[a, b][0]}" for a, b in circles(set(found))]
    assert not lines, "imports in a circle:\n" + "\n".join(lines)


def test_a_module_is_in_a_room():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT


def test_circles_are_found():
    assert circles({("a", "b"), ("b", "c")}) == []
    assert circles({("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")}) == [("b", "c"), ("c", "b")]
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("x", "a")}) == [
        ("a", "b"),
        ("b", "c"),
        ("c", "a"),
    ]
