"""Makes the table and the remarks of docs/reliability.md from the markers of the tests.

python tests/faults/reliability_table.py
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "reliability.md"
FAULT = re.compile(r"^(\d+)\. (.+?)( \*\(no test yet\)\*)?$")
REMARK = " *(no test yet)*"
BEGIN, END = "<!-- table -->\n", "<!-- /table -->\n"


def marked_tests(tests: Path = TESTS) -> dict[int, set[str]]:
    """Return number of a fault -> tests that carry it, as FILE::NAME."""
    found: dict[int, set[str]] = defaultdict(set)
    for path in tests.rglob("test_*.py"):
        for name, number in _marks(ast.parse(path.read_text(encoding="utf-8"))):
            found[number].add(f"{path.relative_to(tests).as_posix()}::{name}")
    return dict(found)


def _marks(tree: ast.Module) -> Iterator[tuple[str, int]]:
    module = [
        number
        for node in tree.body
        if isinstance(node, ast.Assign)
        and [ast.unparse(target) for target in node.targets] == ["pytestmark"]
        for number in _numbers(node.value)
    ]
    for holder in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        own = [
            number for mark in getattr(holder, "decorator_list", []) for number in _numbers(mark)
        ]
        for node in holder.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [number for mark in node.decorator_list for number in _numbers(mark)]
                yield from ((node.name, number) for number in {*module, *own, *marks})


def _numbers(node: ast.expr) -> list[int]:
    """Return the numbers of all `pytest.mark.case(...)` inside an expression."""
    return [
        ast.literal_eval(argument)
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.case"
        for argument in call.args
    ]


def faults(document: str) -> list[tuple[str, int, str, bool]]:
    """Return (heading, number, text, whether it is said to be tested) of the list."""
    found, heading = [], ""
    for line in document.partition("## The faults")[2].splitlines():
        if line.startswith("### "):
            heading = line.removeprefix("### ")
        elif match := FAULT.match(line):
            found.append((heading, int(match[1]), match[2], match[3] is None))
    return found


def table(document: str, marked: Mapping[int, set[str]]) -> str:
    """Return the table: a row for each heading of the list, and their sum."""
    lines = ["| | faults | tested | tests | files |", "| --- | ---: | ---: | ---: | --- |"]
    rows: dict[str, list[int]] = defaultdict(list)
    for heading, number, _, _ in faults(document):
        rows[heading].append(number)
    for heading, numbers in rows.items():
        tested = [number for number in numbers if marked.get(number)]
        tests = {test for number in tested for test in marked[number]}
        files = sorted({test.partition("::")[0].rpartition("/")[2] for test in tests})
        shown = ", ".join(f"`{file}`" for file in files)
        span = f"{numbers[0]} to {numbers[-1]}"
        lines.append(f"| {heading} | {span} | {len(tested)} | {len(tests)} | {shown} |")
    every = {test for tests in marked.values() for test in tests}
    total = sum(map(len, rows.values()))
    lines.append(f"| all | {total} | {len(marked)} | {len(every)} | |")
    return "\n".join(lines) + "\n"


def rendered(document: str, marked: Mapping[int, set[str]]) -> str:
    """Return the document with table and remarks as the markers have them."""
    lines = []
    for line in document.splitlines():
        match = FAULT.match(line)
        remark = "" if match is None or marked.get(int(match[1])) else REMARK
        lines.append(f"{match[1]}. {match[2]}{remark}" if match else line)
    before, _, rest = ("\n".join(lines) + "\n").partition(BEGIN)
    return before + BEGIN + table(document, marked) + END + rest.partition(END)[2]


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(rendered(text, marked_tests()), encoding="utf-8")
