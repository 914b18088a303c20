"""The folders of the package import each other in one direction: the known circles, and no others.

A room is a folder of the package, or a module beside it.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

from claq_exp.sources.code import PACKAGE, import_graph, package_files

# Room and room that it imports: why this one still points backwards.  Without them there is no
# circle.
KNOWN = {
    "claq_exp": {
        ("checkpoint", "models"): "the reader builds a model, and loads it block by block",
        ("checkpoint", "run_folder"): "in all commands a run's folder stands for its checkpoint",
        ("sources", "checkpoint"): "atomic writes and shards of safetensors are in checkpoint/",
        ("sources", "models"): "a GGUF file is converted by the shapes of its model",
        ("payload", "quantize"): "the layout of a block format is of a number format",
        ("reporting", "sweep"): "a report lists the jobs of a sweep that are not finished",
    },
    "claq_exp.quantize": {
        ("number_formats", "kernels"): "a kernel rounds blocks to the table of a number format",
    },
    "claq_exp.runtime": {},
}


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


@pytest.mark.parametrize("folder", KNOWN)
def test_no_new_circle_of_imports_between_folders(folder):
    found = rooms(folder)
    left = circles(found.keys() - KNOWN[folder].keys())
    lines = [f"{a} imports {b}: {found[a, b][0]}" for a, b in left]
    assert not left, "imports in a circle:\n" + "\n".join(lines)


@pytest.mark.parametrize(("folder", "pair"), [(f, pair) for f in KNOWN for pair in KNOWN[f]])
def test_a_known_circle_that_is_gone_is_struck_off(folder, pair):
    found = rooms(folder)
    assert pair in found, f"{pair} is not imported any more: strike it off KNOWN"
    without = found.keys() - (KNOWN[folder].keys() - {pair})
    assert circles(without), f"{pair} is in no circle any more: strike it off KNOWN"


def test_circles_are_found():
    assert circles({("a", "b"), ("b", "c")}) == []
    assert circles({("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")}) == [("b", "c"), ("c", "b")]
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("x", "a")}) == [
        ("a", "b"),
        ("b", "c"),
        ("c", "a"),
    ]
