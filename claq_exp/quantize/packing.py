"""Integers of 1 to 31 bits packed without gaps, least significant bit first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from claq_exp.quantize.layout import packed_bytes

CHUNK = 1 << 22  # integers expanded to single bits at a time, to bound memory


def pack(values: Tensor, width: int) -> Tensor:
    """Pack the last dimension of non-negative integers below 2**width.

    values: [..., n], any integer dtype.  Returns uint8 [..., ceil(n * width / 8)]: every row of the
    leading dimensions starts at a byte.
    """
    rows = values.reshape(-1, values.shape[-1]).numpy()
    packed = np.empty((rows.shape[0], packed_bytes(rows.shape[1], width)), dtype=np.uint8)
    positions = np.arange(width, dtype=np.uint32)
    step = max(1, CHUNK // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        chunk = rows[start : start + step].astype(np.uint32)
        bits = ((chunk[:, :, None] >> positions) & 1).astype(np.uint8)
        packed[start : start + step] = np.packbits(
            bits.reshape(chunk.shape[0], -1), axis=1, bitorder="little"
        )
    return torch.from_numpy(packed.reshape(*values.shape[:-1], packed.shape[1]))


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """Undo `pack`: uint8 [..., bytes] -> int32 [..., count]."""
    rows = packed.reshape(-1, packed.shape[-1]).numpy()
    values = np.empty((rows.shape[0], count), dtype=np.int32)
    places = (1 << np.arange(width, dtype=np.uint32)).astype(np.uint32)
    step = max(1, CHUNK // max(1, count))
    for start in range(0, rows.shape[0], step):
        bits = np.unpackbits(
            rows[start : start + step], axis=1, count=count * width, bitorder="little"
        )
        values[start : start + step] = bits.reshape(-1, count, width).astype(np.uint32) @ places
    return torch.from_numpy(values.reshape(*packed.shape[:-1], count))
