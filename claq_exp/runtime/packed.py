"""The base of modules that keep a matrix packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from claq_exp.payload import operand_of
from claq_exp.payload.base import Layout
from claq_exp.payload.operand import Operand
from claq_exp.payload.stored import STORED_DTYPES
from claq_exp.runtime.kernels.reference import dense_rows


@dataclass(frozen=True)
class _Ready:
    """The operand that was made of some stored tensors."""

    stored: dict[str, Tensor]
    operand: Operand


class PackedMatrix(nn.Module):
    """Holds a matrix as a checkpoint stores it.

    Buffers are the stored tensors under their suffixes (docs/format.md).  They keep their types
    when the model is cast, for a float16 codebook must not be rounded to bfloat16.

    layout: of the matrix.  dtype: of what the module returns, unless the model is cast.
    shared: another module that holds the matrix in place of this one, which has no stored tensors
        of its own then: the embedding of a tied head.
    """

    shared: PackedMatrix | None

    def __init__(
        self,
        layout: Layout,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        shared: PackedMatrix | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        object.__setattr__(self, "shared", shared)  # it is no part of this module
        for suffix, spec in layout.stored_tensors().items() if shared is None else ():
            stored = torch.empty(spec.shape, dtype=STORED_DTYPES[spec.dtype], device=device)
            self.register_buffer(suffix, stored)
        empty = torch.empty(0, dtype=dtype, device=device)
        self.register_buffer("_stand_in", empty, persistent=False)
        self._ready: _Ready | None = None

    @property
    def weight(self) -> Tensor:
        """Nothing, of the type and on the device that models ask their layers' weights for.

        Models that initialize a weight by name (GPT-2) are told that this was done.
        """
        stand_in = self.get_buffer("_stand_in")
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
        return stand_in

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by suffix."""
        holder = self if self.shared is None else self.shared
        return {suffix: holder.get_buffer(suffix) for suffix in self.layout.stored_tensors()}

    def operand(self) -> Operand:
        """Return the matrix as kernels read it; made anew when a stored tensor is another."""
        if self.shared is not None:
            return self.shared.operand()
        stored, ready = self.stored_tensors(), self._ready
        if ready is None or any(ready.stored[name] is not t for name, t in stored.items()):
            ready = self._ready = _Ready(stored, operand_of(self.layout, stored))
        return ready.operand

    def dequantize(self) -> Tensor:
        """Return the dense matrix: [rows, columns] float32."""
        return dense_rows(self.operand(), 0, self.layout.rows)

    def resident_bytes(self) -> int:
        """Return the bytes of the stored tensors, and of what the operand decoded of them."""
        held = [*self.stored_tensors().values(), *self.operand().derived_tensors()]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        own = self.layout.stored_tensors() if self.shared is None else {}
        stored = {suffix: self._buffers[suffix] for suffix in own}
        super()._apply(fn, recurse)
        for suffix, tensor in stored.items():
            moved = self._buffers[suffix]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[suffix] = tensor.to(moved.device)
        self._ready = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = None  # numbers may have changed in place

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}


def packed_modules(model: nn.Module) -> dict[str, PackedMatrix]:
    """Return the modules of a model that hold a packed matrix of their own, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedMatrix) and module.shared is None
    }
