"""Work that is done when somebody imports a module, and not before."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def on_import(module: str, action: Callable[[], object]) -> None:
    """Call `action` once `module` has been imported: now, where it is there already."""
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _AfterImport(module, action))


class _AfterImport(MetaPathFinder):
    """Finds one module as the finders behind it do, and has it run an action when it is loaded."""

    def __init__(self, module: str, action: Callable[[], object]) -> None:
        self._module = module
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the awaited module, None for any other."""
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_act(module: ModuleType) -> None:
            load(module)
            self._action()

        spec.loader.exec_module = load_and_act  # type: ignore[method-assign]
        return spec
