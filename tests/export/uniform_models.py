"""A tiny Llama on uniform grids, and its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from conftest import byte_tokenizer, tiny_llama
from torch import nn

from claq_exp.checkpoint.writer import PackedWeight, write_checkpoint
from claq_exp.payload.base import Payload
from claq_exp.payload.columns import Reserved
from claq_exp.payload.row_grid import RowGrid

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
Q_PROJ = "model.layers.0.self_attn.q_proj"
TOKENS = torch.arange(24).reshape(2, 12)


def grid(rows: int, columns: int, bits: int, group_size: int = 32, seed: int = 0) -> RowGrid:
    """A random matrix on grids whose zero codes go from 0 to the last; 0 is whole rows."""
    made = torch.Generator().manual_seed(seed)
    size = group_size or columns
    groups = -(-columns // size)
    scales = 0.01 + 0.1 * torch.rand(rows, groups, generator=made)
    zeros = torch.randint(2**bits, (rows, groups), generator=made, dtype=torch.uint8)
    zeros.view(-1)[:2] = torch.tensor([0, 2**bits - 1])
    codes = torch.randint(2**bits, (columns, rows), generator=made, dtype=torch.uint8).t()
    widths = torch.full((columns,), bits, dtype=torch.uint8)
    return RowGrid(codes, widths, Reserved.none(columns), scales.half(), zeros, size)


def symmetric(weight: RowGrid) -> RowGrid:
    """The same codes around the middle one."""
    middle = 1 << (int(weight.column_bits[0]) - 1)
    return replace(weight, zeros=torch.full_like(weight.zeros, middle))


def write(
    folder: Path, make: Callable[[str, nn.Linear], Payload], **changes: object
) -> Mapping[str, Payload]:
    """Write a checkpoint whose linears are as `make` says; return them by name."""
    source = folder.with_name(f"{folder.name}-source")
    model = tiny_llama(**{**SIZES, **changes})
    tokenizer = byte_tokenizer()
    made = {
        name: make(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers")
    }
    packed = {name: PackedWeight(w.layout(), w.pack()) for name, w in made.items()}
    source.mkdir()
    tokenizer.save_pretrained(source)
    write_checkpoint(folder, model, tokenizer, packed, torch.float16, source=source)
    return made


def write_grids(folder: Path, bits: int, group_size: int = 32) -> Mapping[str, RowGrid]:
    """Write a checkpoint of grids of one kind; return them by name."""
    return write(  # type: ignore[return-value]
        folder, lambda _, m: grid(m.out_features, m.in_features, bits, group_size)
    )


def unpacked(words: torch.Tensor, bits: int, count: int) -> list[list[int]]:
    """Integers of the rows of int32 words, by Python's own integers, first bit first."""
    rows = []
    for row in words.tolist():
        stream = sum((word % 2**32) << (32 * place) for place, word in enumerate(row))
        rows.append([(stream >> (bits * place)) % 2**bits for place in range(count)])
    return rows
