"""What the codes of a matrix in a block format stand for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from claq_exp.number_formats.encoding import Encoded, encode
from claq_exp.number_formats.table import FormatCodebooks

LIMIT_SLACK = 1e-6  # share by which steps may exceed what the limits allow, by rounding


@dataclass(frozen=True)
class BlockLevels:
    """Scales, and the codebook of every block: blocks lie along the rows of a matrix.

    grid: the format and its codebooks.  selectors: [out, blocks] uint8; None for one codebook.
    scales: [out, arrays] uint8, as they are stored.  limits: [out] or [1] float32, the maximum that
    outer scales follow from; None where there are none.
    free_steps: [out, arrays] float, steps that stand in the place of those that follow from scales
    and limits, until they are `rounded`; None for those.
    """

    described: ClassVar[str] = "block formats"

    grid: FormatCodebooks
    selectors: Tensor | None
    scales: Tensor
    limits: Tensor | None
    free_steps: Tensor | None = None

    @staticmethod
    def of(encoded: Encoded, grid: FormatCodebooks) -> BlockLevels:
        """Return the levels of an encoded matrix."""
        limits = encoded.limit.reshape(-1).contiguous() if grid.format.rule.outer else None
        return BlockLevels(grid, encoded.selectors, encoded.scales, limits)

    @cached_property
    def steps(self) -> Tensor:
        """What codewords are multiplied by: [out, arrays] float32 (that of free steps)."""
        if self.free_steps is not None:
            return self.free_steps
        limit = self.scales.new_zeros(1) if self.limits is None else self.limits
        block_format = self.grid.format
        return block_format.rule.read(self.scales, limit[:, None], block_format.top)

    def values(self, codes: Tensor, columns: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
        """Return what the codes of some rows and columns stand for: [rows, k] -> float32.

        columns: [k] int64, their places in the matrix.  rows: a stretch of them, or [n] int64.
        """
        books = self.grid.codebooks
        words = codes.long()
        if self.selectors is not None:
            words += (
                self.selectors[rows][:, columns // self.grid.format.block].long() * books.shape[1]
            )
        return books.reshape(-1)[words] * self.steps[rows][:, columns // self.grid.format.array]

    def tensors(self) -> list[Tensor | None]:
        """Return the tensors that `values` reads for every matrix of its own."""
        return [self.steps, self.selectors]

    def rounded(self) -> BlockLevels:
        """Return the same with free steps rounded to scales, and limits raised where they must be.

        Every step becomes the nearest of those that its limit allows; a negative one becomes 0.
        """
        if self.free_steps is None:
            return self
        steps, top = self.free_steps.detach().float(), self.grid.format.top
        limits = self.limits
        if limits is not None:
            largest = steps.amax(dim=1) if len(limits) > 1 else steps.amax().reshape(1)
            needed = largest * top
            limits = torch.where(needed > limits * (1 + LIMIT_SLACK), needed, limits)
        lines = steps if limits is not None and len(limits) > 1 else steps.reshape(1, -1)
        scales = self._nearest_scales(lines, limits).reshape(steps.shape)
        return BlockLevels(self.grid, self.selectors, scales, limits)

    def _nearest_scales(self, steps: Tensor, limits: Tensor | None) -> Tensor:
        """Return the stored scale next to each step: [lines, n] float32 -> uint8.

        limits: [lines] float32 or None.
        """
        bytes_ = torch.arange(256, dtype=torch.uint8, device=steps.device).expand(len(steps), -1)
        outer = steps.new_zeros(1) if limits is None else limits
        rule, top = self.grid.format.rule, self.grid.format.top
        known = rule.read(bytes_.contiguous(), outer[:, None], top)
        known = torch.where(known.signbit() | ~torch.isfinite(known), torch.inf, known)
        known, order = known.sort(dim=1, stable=True)
        middles = (known[:, 1:] + known[:, :-1]) / 2
        places = torch.searchsorted(middles, steps.contiguous())
        return order.gather(1, places).to(torch.uint8)


def encode_weight(weight: Tensor, grid: FormatCodebooks) -> tuple[Tensor, BlockLevels]:
    """Bring a matrix into a block format: [out, in] float32 -> codes [out, in] uint8, levels.

    Outer scales are those of rows where the format has it so, else there is one.
    """
    encoded = encode(weight, grid, by_row=grid.format.rule.by_row)
    return encoded.codes, BlockLevels.of(encoded, grid)
