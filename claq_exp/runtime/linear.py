"""A linear layer that keeps its weight packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from claq_exp.payload.base import Layout
from claq_exp.payload.operand import Operand
from claq_exp.runtime.kernels import AUTO, REFERENCE, Kernel, choose_kernel, kernel_name
from claq_exp.runtime.kernels.reference import multiply_back
from claq_exp.runtime.packed import PackedMatrix


@dataclass(frozen=True)
class _Chosen:
    """The kernel that was chosen for an operand.  name: that was asked for."""

    name: str
    operand: Operand
    kernel: Kernel


class QuantizedLinear(PackedMatrix):
    """y = x @ weight^T + bias, with the weight as a checkpoint stores it.

    layout: of the weight.  bias: whether there is one, of type `dtype`.  kernel: a name of
    `claq_exp.runtime.kernels.KERNEL` or "auto".  shared: as of PackedMatrix.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        kernel: str = AUTO,
        shared: PackedMatrix | None = None,
    ) -> None:
        super().__init__(layout, dtype=dtype, device=device, shared=shared)
        self.kernel = kernel
        self.in_features, self.out_features = layout.columns, layout.rows
        self.bias: nn.Parameter | None = None
        if bias:
            values = torch.empty(layout.rows, dtype=dtype, device=device)
            self.bias = nn.Parameter(values, requires_grad=False)
        self._chosen: _Chosen | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply: [..., in] -> [..., out], in the type of the inputs; differentiable in them."""
        operand, kernel = self._prepared()
        rows = inputs.reshape(-1, self.in_features)
        if self.shared is not None:
            rows = rows.to(operand.device)  # an embedding may lie on another device than its head
        if kernel.most_inputs is not None and len(rows) > kernel.most_inputs:
            kernel = REFERENCE
        outputs = _product(operand, kernel, rows.contiguous())
        if self.shared is not None:
            outputs = outputs.to(inputs.device)
        if self.bias is not None:
            outputs = outputs + self.bias.to(outputs.dtype)
        return outputs.reshape(*inputs.shape[:-1], self.out_features)

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
        operand, chosen = self.operand(), self._chosen
        if chosen is None or chosen.operand is not operand or chosen.name != self.kernel:
            kernel = choose_kernel(self.kernel, operand)
            chosen = self._chosen = _Chosen(self.kernel, operand, kernel)
        return operand, chosen.kernel

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_chosen": None}


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
