"""The GPTQ layout, which vLLM, SGLang, GPTQModel and transformers read.

Source: AutoGPTQ's and GPTQModel's linear layers.  A matrix of `in` inputs and `out` outputs has

qweight [in * bits / 32, out] int32: codes, packed along the inputs.
qzeros [groups, out * bits / 32] int32: zero codes, packed along the outputs; less 1 in "gptq".
scales [groups, out] float16.  g_idx [in] int32: the group of each input.

w[o, i] = scales[g, o] * (code[i, o] - zero[g, o]) with g = g_idx[i].
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from claq_exp import __version__
from claq_exp.checkpoint.reader import read_weights
from claq_exp.errors import ConfigError
from claq_exp.export.folder import kept_units, publish
from claq_exp.export.grids import WORD, Grids, open_grids, words
from claq_exp.models.load import DTYPES
from claq_exp.payload.row_grid import RowGrid

WHOLE_ROW = -1  # the group size of grids over whole rows
LESS_ONE, AS_IS = "gptq", "gptq_v2"  # how zero codes are stored


def write_gptq(folder: Path, target: Path, *, dtype: str, trust_remote_code: bool = False) -> None:
    """Write uniform grids in the GPTQ layout; the other weights, and packed ends, are dense.

    Zero codes are stored as they are ("gptq_v2"): the older "gptq" stores them less 1, so it has
    none for 0.  Only where every grid is symmetric, "gptq" is written, which all programs read.
    dtype: of what is not packed.  Raises ConfigError for what the layout cannot say.
    """
    opened = open_grids(folder, "gptq", dtype=dtype, trust_remote_code=trust_remote_code)
    bits, group_size = common_grid(opened.grids)
    symmetric = _symmetric(folder, opened.grids)

    def store(weight: RowGrid) -> dict[str, Tensor]:
        return gptq_tensors(weight, less=1 if symmetric else 0)

    units = chain(opened.units(store, DTYPES[dtype]), kept_units(folder, DTYPES[dtype]))
    config = quantization_config(bits, group_size, symmetric=symmetric)
    publish(folder, target, units, config, DTYPES[dtype])


def common_grid(grids: Grids) -> tuple[int, int]:
    """Return the bits and the group size that all matrices have; -1 is whole rows.

    Raises ConfigError where there is more than one, or codes that fill no whole words.
    """
    first, layout = next(iter(grids.items()))
    bits = layout.bits
    for name, other in grids.items():
        if other.bits != bits:
            raise ConfigError(
                f"{name} has {other.bits} bits and {first} {bits}: format=gptq has one width for "
                "the model; use format=compressed-tensors"
            )
        for size, what in ((other.columns, "inputs"), (other.rows, "outputs")):
            if size * bits % WORD:
                other_format = "dense" if other.columns % other.group_size else "compressed-tensors"
                raise ConfigError(
                    f"{name} has {size} {what}: their codes of {bits} bits fill no whole 32-bit "
                    f"words, as format=gptq asks for; use format={other_format}"
                )
    whole = all(other.group_size >= other.columns for other in grids.values())
    size = max(other.group_size for other in grids.values())
    for name, other in grids.items():
        if not whole and other.group_size != min(size, other.columns):
            raise ConfigError(
                f"{name} has groups of {other.group_size} columns and another layer of {size}: "
                "format=gptq has one group size for the model; use format=compressed-tensors"
            )
    return bits, WHOLE_ROW if whole else size


def _symmetric(folder: Path, grids: Grids) -> bool:
    """Tell whether every zero code is the middle one."""
    return all(
        bool((weight.zeros == 1 << (grids[name].bits - 1)).all())
        for name, weight in read_weights(folder)
        if name in grids and isinstance(weight, RowGrid)
    )


def gptq_tensors(weight: RowGrid, less: int) -> dict[str, Tensor]:
    """Return the tensors of a matrix.  less: what zero codes are stored less."""
    bits = weight.layout().bits
    groups = torch.arange(weight.shape[1], dtype=torch.int32) // weight.group_size
    zeros = weight.zeros.t().to(torch.int32) - less
    return {
        "qweight": words(weight.codes, bits).t(),
        "qzeros": words(zeros % (1 << bits), bits),
        "scales": weight.scales.t(),
        "g_idx": groups,
    }


def quantization_config(bits: int, group_size: int, *, symmetric: bool) -> dict[str, Any]:
    """Return what config.json says of the layout.

    Grids are of neighbouring columns whatever order they were quantized in, so `desc_act` is false.
    """
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": LESS_ONE if symmetric else AS_IS,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"claq_exp:{__version__}"]},
    }
