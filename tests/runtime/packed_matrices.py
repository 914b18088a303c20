"""Random packed matrices of every form, and how far a float32 product may be off."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from claq_exp.payload import (
    ColumnCodebooks,
    GroupTable,
    RowCodebooks,
    RowGrid,
    SharedCodebooks,
    operand_of,
)
from claq_exp.payload.columns import ColumnPayload, Reserved
from claq_exp.payload.operand import Operand


def random_weight(
    rows: int,
    columns: int,
    widths: Sequence[int] = (2,),
    *,
    reserved: float = 0.0,
    shared: bool = False,
    row_scales: bool = False,
    group_size: int = 0,
    table: bool = False,
    by_row: bool = False,
    seed: int = 0,
) -> ColumnPayload:
    """A matrix whose columns have `widths` in random order.

    reserved: share of the entries.  group_size: not 0 for a row grid, or a table with scales.
    by_row: codebooks of rows.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half()

    order = torch.randperm(columns, generator=generator) % len(widths)
    bits = torch.tensor(list(widths), dtype=torch.uint8)[order]
    codes = (torch.rand(rows, columns, generator=generator) * 2.0 ** bits.float()).to(torch.uint8)
    scales = normal(rows) if row_scales else None
    chosen = torch.rand(columns, rows, generator=generator) < reserved
    owners, places = chosen.nonzero(as_tuple=True)
    codes[places, owners] = 0
    coded = codes, bits, Reserved(chosen.sum(1), places, 10 * normal(len(places)))
    if group_size:
        if table:
            used, counts = torch.unique(bits, return_counts=True)
            levels = torch.cat([normal(2**width).sort().values for width in used.tolist()])
            groups = sum(-(-count // group_size) for count in counts.tolist())
            return GroupTable(*coded, levels, normal(rows, groups), group_size)
        groups = -(-columns // group_size)
        zeros = torch.randint(2 ** widths[0], (rows, groups), generator=generator)
        scales = normal(rows, groups).abs() + 0.1
        return RowGrid(*coded, scales, zeros.to(torch.uint8), group_size)
    if by_row:
        return RowCodebooks(*coded, normal(rows, 2 ** widths[0]))
    if shared:
        books = {width: normal(2**width).sort().values for width in sorted(set(bits.tolist()))}
        return SharedCodebooks(*coded, books, normal(columns, 2), scales)
    values = normal(columns, 2 ** int(bits.max()))
    values[torch.arange(values.shape[1]) >= 2 ** bits[:, None].int()] = 0
    return ColumnCodebooks(*coded, values, scales)


def operand(weight: ColumnPayload, device: str = "cpu") -> Operand:
    """The matrix as kernels read it, from its stored tensors."""
    stored = {suffix: tensor.to(device) for suffix, tensor in weight.pack().items()}
    return operand_of(weight.layout(), stored)


def exact_product(weight: ColumnPayload, inputs: Tensor) -> Tensor:
    """inputs @ matrix^T in float64."""
    return inputs.double() @ weight.dequantize().double().t()


def rounding_bound(weight: ColumnPayload, inputs: Tensor) -> Tensor:
    """How far a float32 sum in any order may be from `exact_product`.

    n products and n - 1 sums are each rounded to half an ulp (gamma_n of Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1); 8 more for scales, corrections and the output.
    """
    sizes = inputs.double().abs() @ weight.dequantize().double().abs().t()
    eps = torch.finfo(torch.float32).eps / 2
    output = torch.finfo(inputs.dtype).eps / 2 if inputs.dtype != torch.float32 else 0.0
    return ((weight.codes.shape[1] + 8) * eps + output) * sizes + 1e-30
