"""An embedding that keeps its table packed, and decodes the rows that are looked up."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from claq_exp.payload.base import Layout
from claq_exp.payload.operand import Operand
from claq_exp.runtime.kernels import Lookup, choose_lookup
from claq_exp.runtime.packed import PackedMatrix


class QuantizedEmbedding(PackedMatrix):
    """Looks tokens up in a table as a checkpoint stores it.

    layout: of the table.  table: the embedding that it replaces, whose own way to look up is kept
    (Gemma's multiplies by a scale); its weight goes.  padding_idx matters to gradients alone, which
    a packed table has none of.
    """

    def __init__(
        self,
        layout: Layout,
        table: nn.Embedding,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(layout, dtype=dtype, device=device)
        self.num_embeddings, self.embedding_dim = layout.rows, layout.columns
        self.padding_idx = table.padding_idx
        table.padding_idx = None
        del table.weight
        table.__dict__["weight"] = self.weight  # no parameter: it is told to be initialized
        self.rule = table
        self._chosen: tuple[Operand, Lookup] | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the rows of tokens: [...] integers -> [..., width].

        Raises IndexError for a token that the table has not; on a GPU that is torch's assertion.
        """
        operand, look_up = self._prepared()
        asked = tokens.to(operand.device, torch.int64)
        rows = look_up(operand, asked.reshape(-1), self.weight.dtype)
        places = torch.arange(len(rows), device=operand.device).reshape(asked.shape)
        return _looked_up(self.rule, rows, places)

    def _prepared(self) -> tuple[Operand, Lookup]:
        operand = self.operand()
        if self._chosen is None or self._chosen[0] is not operand:
            self._chosen = operand, choose_lookup(operand)
        return self._chosen

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_chosen": None}

    def extra_repr(self) -> str:
        """Describe the embedding as torch prints it."""
        widths = "/".join(map(str, self.layout.widths()))
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={widths}"


def _looked_up(rule: nn.Embedding, rows: Tensor, places: Tensor) -> Tensor:
    """Look places up in some rows as an embedding does, which stays as it is."""
    shell = copy.copy(rule)
    shell.__dict__["weight"] = rows
    found: Tensor = type(rule).forward(shell, places)
    return found
