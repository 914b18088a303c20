"""Integers of 1 to 31 bits packed without gaps, least significant bit first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from claq_exp.payload.stored import packed_bytes

CHUNK = 1 << 20  # integers expanded to single bits at a time, to bound memory
GROUP = 8  # integers that start at a byte whatever their width


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
    """Undo `pack`, on the device of `packed`: uint8 [..., bytes] -> int32 [..., count]."""
    groups = -(-count // GROUP)
    missing = groups * width - packed.shape[-1]
    parts = pad(packed, (0, missing)).reshape(*packed.shape[:-1], groups, width)
    values = torch.empty(*parts.shape[:-1], GROUP, dtype=torch.int32, device=packed.device)
    for place in range(GROUP):  # an integer lies in as many bytes as its first to its last bit
        first, shift = divmod(place * width, 8)
        dtype = torch.int32 if shift + width < 32 else torch.int64
        word = parts[..., first].to(dtype)
        for more in range(1, packed_bytes(1, shift + width)):
            word |= parts[..., first + more].to(dtype) << (8 * more)
        values[..., place] = (word >> shift) & ((1 << width) - 1)
    return values.reshape(*packed.shape[:-1], -1)[..., :count]


def unpack_some(packed: Tensor, width: int, lines: Tensor, places: Tensor) -> Tensor:
    """Return single integers of packed lines, on the device of `packed`.

    packed: uint8 [lines, bytes].  lines, places: [n] int64, which line and which of its integers.
    Returns [n] int64.
    """
    first, shift = places * width // 8, places * width % 8
    values = torch.zeros_like(places)
    for more in range(packed_bytes(1, 7 + width)):  # an integer may begin at any bit of a byte
        byte = (first + more).clamp(max=packed.shape[1] - 1)  # beyond the line it has no bits
        values |= packed[lines, byte].long() << (8 * more)
    return (values >> shift) & ((1 << width) - 1)
