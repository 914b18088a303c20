"""Has a model in float64 computed in float64 throughout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FLOAT64 = "float64"


def wide_passes(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return a context for what a model of this dtype computes; it matters to float64 alone.

    The code of models asks for float32 where 16 bits are too few: in norms, tables of positions,
    softmax.  Inside this context it gets float64 there.
    """
    return _Wide() if dtype == torch.float64 else nullcontext()


class _Wide(TorchFunctionMode):
    """Puts float64 into the place of each float32 that an operation is asked for."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        asked = {key: _wide(value) for key, value in (kwargs or {}).items()}
        called = Tensor.double if func is Tensor.float else func
        return called(*map(_wide, args), **asked)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
