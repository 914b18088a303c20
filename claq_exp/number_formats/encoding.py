"""From numbers to a block format and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from claq_exp.errors import NumericalError
from claq_exp.number_formats.search import codewords, find_codes, round_numbers, spread
from claq_exp.number_formats.table import FormatCodebooks


@dataclass(frozen=True)
class Encoded:
    """Numbers in a block format.

    codes: [rows, columns] uint8.  selectors: [rows, blocks] uint8, the codebook of each block; None
    where there is one codebook.  scales: [rows, arrays], as they are stored.
    limit: [rows, 1] or [1, 1] float32, the maximum that outer scales follow from.
    """

    codes: Tensor
    selectors: Tensor | None
    scales: Tensor
    limit: Tensor

    def steps(self, grid: FormatCodebooks) -> Tensor:
        """Return what codewords are multiplied by: [rows, arrays] float32."""
        return grid.format.rule.read(self.scales, self.limit, grid.format.top)


def array_maxima(values: Tensor, array: int) -> Tensor:
    """Return the largest magnitude of each array: [rows, columns] -> [rows, arrays] float32.

    array: neighbours; 0 for whole rows.
    """
    columns = values.shape[-1]
    array = min(array or columns, columns)
    whole = values if columns % array == 0 else pad(values, (0, -columns % array))
    low, high = torch.aminmax(whole.unflatten(-1, (-1, array)), dim=-1)
    return torch.maximum(high, -low).float()


def encode(values: Tensor, grid: FormatCodebooks, *, by_row: bool = False) -> Encoded:
    """Bring numbers into a block format.

    values: [rows, columns] float32.  by_row: outer scales follow from the maximum of a row, and not
    from that of all.
    Raises NumericalError for a number that is not finite.
    """
    maxima = array_maxima(values, grid.format.array)
    limit = maxima.amax(dim=1, keepdim=True) if by_row else maxima.amax().reshape(1, 1)
    _check(limit)
    scales = grid.format.rule.find(maxima, limit, grid.format.top)
    steps = grid.format.rule.read(scales, limit, grid.format.top)
    return Encoded(*find_codes(values, steps, grid), scales, limit)


def decode(encoded: Encoded, grid: FormatCodebooks) -> Tensor:
    """Return the numbers that codes stand for: [rows, columns] float32."""
    columns = encoded.codes.shape[1]
    words = codewords(encoded.codes, encoded.selectors, grid)
    return words * spread(encoded.steps(grid), grid.format.array, columns)


def round_values(
    values: Tensor, grid: FormatCodebooks, *, by_row: bool = True, limit: float | None = None
) -> Tensor:
    """Return the nearest numbers that a block format has, of the type of the values.

    The same as encode and decode.  values: [..., columns] of a floating dtype.
    limit: what outer scales follow from, known before; larger numbers are cut; None to find it.
    Raises NumericalError, on a CPU, for a number that is not finite; a GPU is not waited for, and
    gives NaN.
    """
    block_format = grid.format
    rows = values.detach().reshape(-1, values.shape[-1])
    if not len(rows):
        return values
    maxima = array_maxima(rows, block_format.array)
    if limit is not None:
        outer = maxima.new_full((1, 1), limit)
    else:
        outer = maxima.amax(dim=1, keepdim=True) if by_row else maxima.amax().reshape(1, 1)
    if rows.device.type == "cpu":
        _check(maxima)
    scales = block_format.rule.find(maxima, outer, block_format.top)
    steps = block_format.rule.read(scales, outer, block_format.top)
    return round_numbers(rows, steps, grid).reshape(values.shape)


def _check(maxima: Tensor) -> None:
    if not bool(torch.isfinite(maxima).all()):
        raise NumericalError("a number to be quantized is not finite")
