"""Random packed matrices of every form, and how far a float32 product may be off."""

from __future__ import annotations

import torch
from torch import Tensor

from claq_exp.quantize.quantized import (
    ColumnCodebooks,
    QuantizedWeight,
    Reserved,
    RowGrid,
    SharedCodebooks,
)
from claq_exp.runtime.operand import Operand, operand_of


def random_weight(
    rows: int,
    columns: int,
    widths: tuple[int, ...] = (2,),
    *,
    reserved: int = 0,
    shared: bool = False,
    row_scales: bool = False,
    group_size: int = 0,
    seed: int = 0,
) -> QuantizedWeight:
    """A matrix whose columns have `widths` in turn, with at most `reserved` entries a column.

    group_size: not 0 for a row grid.
    """
    generator = torch.Generator().manual_seed(seed)
    bits = torch.tensor([widths[i % len(widths)] for i in range(columns)], dtype=torch.uint8)
    draws = torch.rand(rows, columns, generator=generator)
    codes = (draws * 2.0 ** bits.float()).to(torch.uint8)
    if group_size:
        groups = -(-columns // group_size)
        scales = (0.1 + torch.rand(rows, groups, generator=generator)).half()
        zeros = (torch.rand(rows, groups, generator=generator) * 2 ** widths[0]).to(torch.uint8)
        levels = RowGrid(scales, zeros, group_size)
        return QuantizedWeight(codes, bits, levels, Reserved.none(columns))
    scales = (0.5 + torch.rand(rows, generator=generator)).half() if row_scales else None
    if shared:
        books = {
            width: torch.randn(2**width, generator=generator).sort().values.half()
            for width in set(bits.tolist())
        }
        levels = SharedCodebooks(books, torch.randn(columns, 2, generator=generator).half(), scales)
    else:
        values = torch.zeros(columns, 2 ** max(widths))
        for column, width in enumerate(bits.tolist()):
            entries = torch.randn(2**width, generator=generator)
            values[column, : 2**width] = entries.sort().values
        levels = ColumnCodebooks(values.half(), scales)
    counts = torch.randint(0, min(reserved, rows) + 1, (columns,), generator=generator)
    kept = [torch.randperm(rows, generator=generator)[:count].sort().values for count in counts]
    places = torch.cat(kept)
    owners = torch.repeat_interleave(torch.arange(columns), counts)
    codes[places, owners] = 0
    outliers = (10 * torch.randn(len(places), generator=generator)).half()
    return QuantizedWeight(codes, bits, levels, Reserved(counts, places, outliers))


def operand(weight: QuantizedWeight, device: str = "cpu") -> Operand:
    """The matrix as kernels read it, from its stored tensors."""
    stored = {suffix: tensor.to(device) for suffix, tensor in weight.pack().items()}
    return operand_of(weight.layout(), stored)


def exact_product(weight: QuantizedWeight, inputs: Tensor) -> Tensor:
    """inputs @ matrix^T in float64."""
    return inputs.double() @ weight.dequantize().double().t()


def rounding_bound(weight: QuantizedWeight, inputs: Tensor) -> Tensor:
    """How far a float32 sum in any order may be from `exact_product`.

    n products and n - 1 sums are each rounded to half an ulp (gamma_n of Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1); 8 more for scales, corrections and the output.
    """
    sizes = inputs.double().abs() @ weight.dequantize().double().abs().t()
    eps = torch.finfo(torch.float32).eps / 2
    output = torch.finfo(inputs.dtype).eps / 2 if inputs.dtype != torch.float32 else 0.0
    return ((weight.codes.shape[1] + 8) * eps + output) * sizes + 1e-30
