"""An embedding that keeps its table packed, and decodes the rows that are looked up."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from claq_exp.payload.base import Layout
from claq_exp.payload.gather import gathered
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

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the rows of tokens: [...] integers -> [..., width].

        Raises IndexError for a token that the table has not.
        """
        operand = self.operand()
        asked = tokens.to(operand.device, torch.int64)
        rows = gathered(operand, asked.reshape(-1)).to(self.weight.dtype)
        places = torch.arange(len(rows), device=operand.device).reshape(asked.shape)
        return _looked_up(self.rule, rows, places)

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
