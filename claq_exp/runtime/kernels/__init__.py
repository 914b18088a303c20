"""Ways to multiply activations by a packed matrix, and the choice between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from claq_exp.errors import ConfigError, one_of, telling_line
from claq_exp.payload.gather import gathered
from claq_exp.payload.operand import Operand
from claq_exp.runtime.kernels.cpu import CpuKernel
from claq_exp.runtime.kernels.reference import REFERENCE, ReferenceKernel, dense_rows
from claq_exp.runtime.kernels.triton import TritonKernel

AUTO, DENSE = "auto", "dense"
SAMPLES = 3  # rows of activations of the self-check
CHECKED = 1024  # first and last rows of a matrix that are checked


class Kernel(Protocol):
    """Multiplies by a packed matrix.

    most_inputs: rows of activations from which on dequantizing once is faster; None for no limit.
    """

    most_inputs: ClassVar[int | None]

    def refusal(self, operand: Operand) -> str | None:
        """Say why this kernel cannot take the matrix on this machine, or None when it can."""

    def multiply(self, operand: Operand, inputs: Tensor) -> Tensor:
        """Return inputs @ matrix^T: [n, in] of a floating dtype -> [n, out] of the same dtype.

        Products are summed in float32.
        """


KERNEL: dict[str, type] = {"cpu": CpuKernel, "reference": ReferenceKernel, "triton": TritonKernel}
FASTEST = {"cpu": "cpu", "cuda": "triton"}  # by type of device
LOOKUP: dict[str, type[TritonKernel]] = {"cuda": TritonKernel}  # the same; torch's own elsewhere
Lookup = Callable[[Operand, Tensor, torch.dtype], Tensor]
VECTOR = 16  # rows that kernels take side by side
_failures: dict[tuple[object, ...], str | None] = {}


def choose_kernel(name: str, operand: Operand) -> Kernel:
    """Return a kernel for a matrix, after it has passed a check against the reference.

    name: one of KERNEL, or "auto" for the fastest that takes the matrix and passes the check.
    Raises ConfigError for an unknown name, and for a kernel that cannot take the matrix.
    """
    if name == AUTO:
        return _fastest(operand)
    if name not in KERNEL:
        raise ConfigError(one_of("runtime.kernel", name, [AUTO, *KERNEL]))
    kernel: Kernel = KERNEL[name]()
    if objection := _objection(kernel, operand):
        raise ConfigError(f"runtime.kernel={name}: {objection}; use runtime.kernel=auto")
    return kernel


def _fastest(operand: Operand) -> Kernel:
    """Return the kernel that was made for the operand's device, or the reference with a warning."""
    name = FASTEST.get(operand.device.type)
    if name is None:
        objection: str | None = f"there is no kernel for {operand.device.type}"
    else:
        kernel: Kernel = KERNEL[name]()
        objection = _objection(kernel, operand)
        if not objection:
            return kernel
    warnings.warn(
        f"a packed layer is dequantized for every product, which is slow: {objection}; "
        "kernel='dense' trades memory for speed",
        RuntimeWarning,
        stacklevel=2,
    )
    return REFERENCE


def choose_lookup(operand: Operand) -> Lookup:
    """Return what reads rows of a matrix: (operand, [n] int64, dtype) -> [n, in].

    The kernel of the operand's device, once it has given the reference's rows to the bit, or else
    torch's operations.
    """
    kernel = LOOKUP.get(operand.device.type, TritonKernel)()
    if operand.device.type not in LOOKUP or kernel.refusal(operand):
        return gathered_rows
    if objection := _lookup_objection(kernel, operand):
        warnings.warn(
            f"the rows of a packed embedding are read by torch: the kernel {objection}",
            RuntimeWarning,
            stacklevel=2,
        )
        return gathered_rows
    return kernel.rows


def gathered_rows(operand: Operand, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return some rows of a matrix by torch's operations, on any device: [n, in] of dtype.

    Raises IndexError for a row that it has not.
    """
    return gathered(operand, rows).to(dtype)


def _lookup_objection(kernel: TritonKernel, operand: Operand) -> str | None:
    """Say what is wrong with the rows that a kernel reads, first and last ones, or None."""
    last = operand.rows - 1
    rows = torch.tensor([last, 0, last // 2, last], device=operand.device)
    try:
        found = kernel.rows(operand, rows, torch.float32)
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a driver raises
        return f"fails on this machine ({type(error).__name__}: {telling_line(error)})"
    if torch.equal(found, gathered(operand, rows)):
        return None
    return "gives other rows than the reference on this machine"


def kernel_name(kernel: Kernel) -> str:
    """Return the name of a kernel in KERNEL."""
    return next(name for name, member in KERNEL.items() if isinstance(kernel, member))


def _objection(kernel: Kernel, operand: Operand) -> str | None:
    """Say why a kernel must not be used for a matrix; one of each form is checked in a process."""
    if isinstance(kernel, ReferenceKernel):
        return None
    if refusal := kernel.refusal(operand):
        return refusal
    form = (
        type(kernel),
        operand.device,
        tuple((p.width, p.columns is None, p.levels is None) for p in operand.parts),
        operand.grid is None,
        operand.row_scales is None,
        operand.row_levels is None,
        len(operand.reserved_rows) == 0,
        operand.rows % VECTOR,
    )
    if form not in _failures:
        _failures[form] = self_check(kernel, operand)
    return _failures[form]


def self_check(kernel: Kernel, operand: Operand) -> str | None:
    """Multiply random activations and say what is wrong with the result, or None.

    Each output may be off by what summing `in` float32 products in any order can do.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, operand.columns, generator=generator).to(operand.device)
    try:
        found = kernel.multiply(operand, inputs).double()
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a driver raises
        return f"it fails on this machine ({type(error).__name__}: {telling_line(error)})"
    last = max(operand.rows - CHECKED, 0) // 8 * 8
    for start, stop in {(0, min(CHECKED, operand.rows)), (last, operand.rows)}:
        dense = dense_rows(operand, start, stop).double()
        misses = (found[:, start:stop] - inputs.double() @ dense.t()).abs()
        sizes = inputs.double().abs() @ dense.abs().t()
        bound = (operand.columns + 8) * torch.finfo(torch.float32).eps
        if not bool((misses <= bound * sizes + 1e-30).all()):
            return "its products differ from those of the reference kernel on this machine"
    return None
