"""The layout `pack-quantized` of compressed-tensors, which vLLM and transformers read.

A matrix of `in` inputs and `out` outputs has

weight_packed [out, in * bits / 32] int32: codes, packed along the inputs.
weight_scale [out, groups].  weight_zero_point [out * bits / 32, groups] int32: along the outputs.
weight_shape [2] int64.

Words are packed without gaps, as release 0.20.1 does; 2, 4 and 8 bits are the same in older ones.
The package shifts signed codes and zero codes to unsigned numbers, which ours are.
Source: compressed_tensors/compressors/pack_quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from claq_exp.errors import ConfigError
from claq_exp.export.folder import kept_units, publish
from claq_exp.export.grids import GridCheckpoint, open_grids, words
from claq_exp.models.load import DTYPES
from claq_exp.payload.row_grid import RowGrid, RowGridLayout

FORMAT = "pack-quantized"


def write_compressed_tensors(
    folder: Path, target: Path, *, dtype: str, trust_remote_code: bool = False
) -> None:
    """Write uniform grids as `pack-quantized`; the other weights, and packed ends, are dense.

    dtype: of what is not packed, and of scales: float16 at least, as they are stored.
    Raises ConfigError for what the layout cannot say.
    """
    opened = open_grids(
        folder, "compressed-tensors", dtype=dtype, trust_remote_code=trust_remote_code
    )
    for name, layout in opened.grids.items():
        if layout.columns % layout.group_size:
            raise ConfigError(
                f"{name} has {layout.columns} inputs, no multiple of its group size "
                f"{layout.group_size}, as format=compressed-tensors asks for; quantize with "
                "another codebook.group_size, or use format=dense"
            )

    def store(weight: RowGrid) -> Mapping[str, Tensor]:
        return packed_tensors(weight, DTYPES[dtype])

    units = chain(opened.units(store, DTYPES[dtype]), kept_units(folder, DTYPES[dtype]))
    publish(folder, target, units, quantization_config(opened), DTYPES[dtype])


def packed_tensors(weight: RowGrid, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a matrix; dtype: of scales."""
    bits = weight.layout().bits
    return {
        "weight_packed": words(weight.codes, bits),
        "weight_scale": weight.scales.to(dtype),
        "weight_zero_point": words(weight.zeros.t(), bits).t(),
        "weight_shape": torch.tensor(weight.shape),
    }


def quantization_config(opened: GridCheckpoint) -> dict[str, Any]:
    """Return what config.json says: a group of settings for each kind of grid."""
    kinds: dict[tuple[int, int], list[str]] = {}
    for name, layout in opened.grids.items():
        kinds.setdefault(_kind(layout), []).append(name)
    linears = [name for name, m in opened.model.named_modules() if isinstance(m, nn.Linear)]
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if len(kinds) == 1 else names,
                "weights": _settings(*kind),
                "input_activations": None,
                "output_activations": None,
            }
            for number, (kind, names) in enumerate(kinds.items())
        },
        "ignore": [name for name in linears if name not in opened.grids],
        "kv_cache_scheme": None,
    }


def _kind(layout: RowGridLayout) -> tuple[int, int]:
    """Return bits and group size; 0 is whole rows."""
    return layout.bits, layout.group_size if layout.group_size < layout.columns else 0


def _settings(bits: int, group_size: int) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size or None,
        "actorder": None,
        "dynamic": False,
    }
