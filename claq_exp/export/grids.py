"""Uniform grids as the formats of other programs store them: codes in 32-bit words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad

from claq_exp.checkpoint.reader import (
    check_checkpoint,
    check_dtype,
    check_model,
    read_rounding,
    read_weights,
)
from claq_exp.errors import ConfigError
from claq_exp.models.ends import in_blocks
from claq_exp.models.experts import SeparateExperts
from claq_exp.payload.base import Layout
from claq_exp.payload.packing import pack
from claq_exp.payload.row_grid import RowGrid, RowGridLayout
from claq_exp.tensor_files.shards import Unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTHS = (2, 3, 4, 8)
WORD = 32  # bits
UNIFORM = "quantize with codebook=uniform and reservation=none, or "
WIDTH = "quantize with another number of bits, or "

Grids = Mapping[str, RowGridLayout]
Store = Callable[[RowGrid], Mapping[str, Tensor]]


@dataclass(frozen=True)
class GridCheckpoint:
    """A checkpoint whose linear layers are all on uniform grids.

    grids: name of a linear -> its layout.  ends: packed embedding and head, which are written
    dense.  model: on the meta device.
    """

    folder: Path
    grids: Grids
    ends: Mapping[str, Layout]
    model: PreTrainedModel

    def units(self, store: Store, dtype: torch.dtype) -> Iterator[Unit]:
        """Yield what is written of each packed matrix.

        store: returns the tensors of a matrix in the format, by suffix.  dtype: of dense ends.
        """
        for name, weight in read_weights(self.folder):
            if name in self.ends:
                yield Unit({f"{name}.weight": weight.dequantize()}, dtype)
            else:
                assert isinstance(weight, RowGrid)  # its layout says so
                yield Unit({f"{name}.{s}": t.contiguous() for s, t in store(weight).items()})


def open_grids(
    folder: Path, format_: str, *, dtype: str, trust_remote_code: bool = False
) -> GridCheckpoint:
    """Check a checkpoint, and that each of its linear layers is on a uniform grid.

    Raises ConfigError that names the layer and what to do, CheckpointError for damage.
    """
    layouts = check_checkpoint(folder, trust_remote_code=trust_remote_code)
    refuse = partial(_refuse, format_)
    if read_rounding(folder) is not None:
        raise ConfigError(
            f"format={format_} does not round activations as this checkpoint does; use format=dense"
        )
    linears = in_blocks(layouts)
    grids = {}
    for name, layout in linears.items():
        if not isinstance(layout, RowGridLayout):
            refuse(name, f"is stored as {layout.describe()}, not on a uniform grid")
        if layout.reserved:
            refuse(name, f"has {layout.reserved} entries in 16 bits beside its codes")
        if layout.bits not in WIDTHS:
            refuse(name, f"has codes of {layout.bits} bits, not 2, 3, 4 or 8", WIDTH)
        grids[name] = layout
    model = check_model(folder, layouts, trust_remote_code=trust_remote_code)
    check_dtype(folder, layouts, dtype)
    _check_modules(model, grids, refuse)
    ends = {name: layout for name, layout in layouts.items() if name not in grids}
    return GridCheckpoint(folder, grids, ends, model)


def _check_modules(
    model: PreTrainedModel, grids: Grids, refuse: Callable[[str, str, str], NoReturn]
) -> None:
    """Refuse layers that other programs do not hold as a linear layer of its own."""
    from torch import nn

    mixtures = [name for name, m in model.named_modules() if isinstance(m, SeparateExperts)]
    for name in grids:
        if any(name.startswith(f"{mixture}.") for mixture in mixtures):
            refuse(name, "is an expert of a mixture, which transformers holds as one tensor", "")
        if not isinstance(model.get_submodule(name), nn.Linear):
            refuse(name, "is a Conv1D, and not a Linear", "")


def _refuse(format_: str, name: str, why: str, instead: str = UNIFORM) -> NoReturn:
    """Raise ConfigError.  instead: how the layer could be quantized, where that would help."""
    raise ConfigError(
        f"{name} {why}, and format={format_} cannot say it; {instead}use format=dense"
    )


def words(values: Tensor, bits: int) -> Tensor:
    """Pack the last dimension into int32 words without gaps, least significant bit first.

    values: [..., n] integers below 2**bits.  Returns [..., ceil(n * bits / 32)]; the last word is
    filled with zeros.
    """
    packed = pack(values, bits)
    return pad(packed, (0, -packed.shape[-1] % 4)).contiguous().view(torch.int32)
