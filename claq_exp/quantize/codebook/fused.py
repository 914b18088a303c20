"""Multiply and add with one rounding, where the source says so and not where a compiler likes."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic


@intrinsic
def multiply_add(_context: Any, factor: Any, value: Any, addend: Any) -> Any:
    """factor * value + addend, all float32, rounded once."""
    if (factor, value, addend) != (types.float32,) * 3:
        return None

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(factor, value, addend), generate
