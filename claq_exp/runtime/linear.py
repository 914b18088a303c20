"""A linear layer that keeps its weight packed."""

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
from claq_exp.runtime.kernels import AUTO, REFERENCE, Kernel, choose_kernel, kernel_name
from claq_exp.runtime.kernels.reference import dense_rows, multiply_back


@dataclass(frozen=True)
class _Ready:
    """What was worked out for a layer.  name: of the kernel that was asked for."""

    name: str
    stored: dict[str, Tensor]
    operand: Operand
    kernel: Kernel


class QuantizedLinear(nn.Module):
    """y = x @ weight^T + bias, with the weight as a checkpoint stores it.

    Buffers are the stored tensors under their suffixes (docs/format.md).  They keep their types
    when the model is cast, for a float16 codebook must not be rounded to bfloat16.

    layout: of the weight.  bias: whether there is one, of type `dtype`.  kernel: a name of
    `claq_exp.runtime.kernels.KERNEL` or "auto".
    """

    def __init__(
        self,
        layout: Layout,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        kernel: str = AUTO,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.kernel = kernel
        self.in_features, self.out_features = layout.columns, layout.rows
        for suffix, spec in layout.stored_tensors().items():
            stored = torch.empty(spec.shape, dtype=STORED_DTYPES[spec.dtype], device=device)
            self.register_buffer(suffix, stored)
        empty = torch.empty(0, dtype=dtype, device=device)
        self.register_buffer("_stand_in", empty, persistent=False)
        self.bias: nn.Parameter | None = None
        if bias:
            values = torch.empty(layout.rows, dtype=dtype, device=device)
            self.bias = nn.Parameter(values, requires_grad=False)
        self._ready: _Ready | None = None

    @property
    def weight(self) -> Tensor:
        """Nothing, of the type and on the device that models ask their linear layers' weights for.

        Models that initialize a weight by name (GPT-2) are told that this was done.
        """
        stand_in = self.get_buffer("_stand_in")
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
        return stand_in

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by suffix."""
        return {suffix: self.get_buffer(suffix) for suffix in self.layout.stored_tensors()}

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply: [..., in] -> [..., out], in the type of the inputs; differentiable in them."""
        operand, kernel = self._prepared()
        rows = inputs.reshape(-1, self.in_features)
        if kernel.most_inputs is not None and len(rows) > kernel.most_inputs:
            kernel = REFERENCE
        outputs = _product(operand, kernel, rows.contiguous())
        if self.bias is not None:
            outputs = outputs + self.bias.to(outputs.dtype)
        return outputs.reshape(*inputs.shape[:-1], self.out_features)

    def operand(self) -> Operand:
        """Return the weight as kernels read it."""
        return self._prepared()[0]

    def dequantize(self) -> Tensor:
        """Return the dense weight: [out, in] float32."""
        return dense_rows(self.operand(), 0, self.out_features)

    def resident_bytes(self) -> int:
        """Return the bytes of the stored tensors, and of what the operand decoded of them."""
        held = [*self.stored_tensors().values(), *self.operand().derived_tensors()]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def chosen_kernel(self) -> Kernel:
        """Return the kernel that serves few rows of activations, chosen now if it was not before.

        Raises ConfigError when the wanted one cannot take this matrix on this machine.
        """
        return self._prepared()[1]

    def extra_repr(self) -> str:
        """Describe the layer as torch prints it."""
        widths = "/".join(map(str, self.layout.widths()))
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={widths}, kernel={self.kernel}"
        )

    def _prepared(self) -> tuple[Operand, Kernel]:
        stored, ready = self.stored_tensors(), self._ready
        if ready is not None and any(ready.stored[name] is not t for name, t in stored.items()):
            ready = None
        if ready is None or ready.name != self.kernel:
            operand = ready.operand if ready else operand_of(self.layout, stored)
            kernel = choose_kernel(self.kernel, operand)
            ready = self._ready = _Ready(self.kernel, stored, operand, kernel)
        return ready.operand, ready.kernel

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stored = {suffix: self._buffers[suffix] for suffix in self.layout.stored_tensors()}
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


class _Product(torch.autograd.Function):
    """inputs @ weight^T with gradients of the inputs; the dense weight is not kept for them."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, operand: Operand, kernel: Kernel) -> Tensor:
        ctx.operand = operand
        return kernel.multiply(operand, inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return multiply_back(ctx.operand, gradient), None, None


def _product(operand: Operand, kernel: Kernel, inputs: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and inputs.requires_grad):
        return kernel.multiply(operand, inputs)
    outputs: Tensor = _Product.apply(inputs, operand, kernel)
    return outputs


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the packed layers of a model by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def use_kernel(model: nn.Module, kernel: str) -> dict[str, str]:
    """Make every packed layer of a model use a kernel; return layer -> kernel that serves it.

    Raises ConfigError when the kernel cannot take a matrix on this machine.
    """
    layers = quantized_linears(model)
    for layer in layers.values():
        layer.kernel = kernel
    return {name: kernel_name(layer.chosen_kernel()) for name, layer in layers.items()}
