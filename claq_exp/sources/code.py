"""Which source files compute a value: the import graph of this package, and hashes over it."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from claq_exp.sources.cache import sha256_of

PACKAGE = Path(__file__).parents[1]
TYPE_CHECKING = "TYPE_CHECKING"  # what is imported for types alone computes nothing


def code_of(files: Iterable[Path]) -> str:
    """Return a hash of source files: what code has made must not outlive a change of it.

    Raises ValueError for no files, for their hash would never change.
    """
    contents = [sha256_of(path) for path in sorted(files)]
    if not contents:
        raise ValueError("a hash of no source files stands for no code")
    return hashlib.sha256("".join(contents).encode()).hexdigest()


def code_behind(*modules: str) -> str:
    """Return a hash of the files of some modules of this package and of all that they import.

    modules: dotted names.  Raises ValueError for one that is not there: a file that has moved must
    take its key along.
    """
    return _code_behind(modules)


@cache  # the code that runs was imported once too
def _code_behind(modules: tuple[str, ...]) -> str:
    files = package_files(PACKAGE)
    return code_of(files[name] for name in reached(import_graph(files), modules))


def package_files(package: Path) -> dict[str, Path]:
    """Return dotted name -> file of all modules of a package; a folder's is its __init__.py."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def import_graph(files: Mapping[str, Path]) -> dict[str, frozenset[str]]:
    """Return module -> modules of the same package that it imports, by reading the source.

    The __init__.py of its folders is among them.  Imports inside functions count, and so do names
    of modules in `import_module("...")`; those under `if TYPE_CHECKING` do not.
    """
    return {
        name: frozenset({*_known(name, files), *_imported(path, files)} - {name})
        for name, path in files.items()
    }


def reached(graph: Mapping[str, frozenset[str]], modules: Iterable[str]) -> list[str]:
    """Return the given modules and all that they import in any number of steps, sorted.

    Raises ValueError for a module that is not in the graph.
    """
    waiting, found = list(modules), set()
    if missing := [name for name in waiting if name not in graph]:
        raise ValueError(f"there is no module {', '.join(missing)}")
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return sorted(found)


def _imported(path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for node in _running(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _known(alias.name, files)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield from _known(f"{node.module}.{alias.name}", files)
        elif _names_a_module(node):
            yield from _known(node.args[0].value, files)  # type: ignore[attr-defined]


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == TYPE_CHECKING:
            for other in node.orelse:
                yield from (other, *_running(other))
        else:
            yield from (node, *_running(node))


def _names_a_module(node: ast.AST) -> bool:
    """Tell whether a node is `import_module("...")`."""
    return (
        isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
        and bool(node.args)
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    )


def _known(dotted: str, files: Mapping[str, Path]) -> Iterator[str]:
    """Yield the module that a dotted name is of, or is in, and the folders that it lies in.

    Not the package itself, whose __init__.py computes nothing.
    """
    parts = dotted.split(".")
    names = (".".join(parts[:count]) for count in range(2, len(parts) + 1))
    yield from (name for name in names if name in files)
