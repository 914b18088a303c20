"""The scale that an array of neighbours shares: how it is found, stored and read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

E4M3_MAX = 448.0
E4M3_LEAST = 2.0**-9  # the smallest E4M3 above zero
E8M0_BIAS = 127
LEAST_NORMAL = float(torch.finfo(torch.float32).tiny)
HALF_LEAST = float(torch.finfo(torch.float16).tiny)


@dataclass(frozen=True)
class ScaleRule:
    """One way to store scales.

    find: (maxima of |x| of arrays, maximum over all that share the outer scale, largest codeword)
        -> stored scales.
    read: (stored scales, the outer maximum, largest codeword) -> what codewords are multiplied by,
        float32; 0 for an array of zeros.
    bits: of a stored scale.
    outer: the scale depends on an outer maximum, a float32 that is stored with it.
    by_row: every row of a weight has an outer maximum, else the whole matrix.
    """

    find: Callable[[Tensor, Tensor, float], Tensor]
    read: Callable[[Tensor, Tensor, float], Tensor]
    bits: int
    outer: bool
    by_row: bool = False


def to_e4m3(values: Tensor) -> Tensor:
    """Round to the nearest E4M3 (ties to even), cut at its ends: float32 -> float8_e4m3fn.

    Cut before the cast, for libraries differ in what they do beyond the ends.
    """
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _e4m3_unit(limit: Tensor, top: float) -> Tensor:
    """Return the outer scale under which the largest array has the largest E4M3 as its scale."""
    return (limit / (top * E4M3_MAX)).clamp(min=LEAST_NORMAL)


def _find_e4m3(maxima: Tensor, limit: Tensor, top: float) -> Tensor:
    scales = to_e4m3(maxima / top / _e4m3_unit(limit, top)).float().clamp(min=E4M3_LEAST)
    return _bytes(torch.where(maxima > 0, scales, 0.0).to(torch.float8_e4m3fn))


def _read_e4m3(stored: Tensor, limit: Tensor, top: float) -> Tensor:
    return stored.view(torch.float8_e4m3fn).float() * _e4m3_unit(limit, top)


def _find_inverse(maxima: Tensor, limit: Tensor, top: float) -> Tensor:
    ratios = to_e4m3(limit / maxima.clamp(min=LEAST_NORMAL)).float().clamp(min=E4M3_LEAST)
    return _bytes(torch.where(maxima > 0, ratios, 0.0).to(torch.float8_e4m3fn))


def _read_inverse(stored: Tensor, limit: Tensor, top: float) -> Tensor:
    ratios = stored.view(torch.float8_e4m3fn).float()
    return torch.where(ratios > 0, limit / (top * ratios), 0.0)


def _find_e8m0(maxima: Tensor, _: Tensor, top: float) -> Tensor:
    exponents = torch.frexp(maxima)[1] - torch.frexp(torch.tensor(top))[1].item()
    stored = (exponents + E8M0_BIAS).clamp(1, 2 * E8M0_BIAS)
    return torch.where(maxima > 0, stored, 0).to(torch.uint8)


def _read_e8m0(stored: Tensor, _limit: Tensor, _top: float) -> Tensor:
    return (stored.int() << 23).view(torch.float32)  # the exponent of a float32 is biased alike


def _integer_unit(limit: Tensor, top: float) -> Tensor:
    return (limit / top / 255.0).clamp(min=LEAST_NORMAL)


def _find_integer(maxima: Tensor, limit: Tensor, top: float) -> Tensor:
    return (maxima / top / _integer_unit(limit, top)).round().clamp(0, 255).to(torch.uint8)


def _read_integer(stored: Tensor, limit: Tensor, top: float) -> Tensor:
    return stored.float() * _integer_unit(limit, top)


def _find_half(maxima: Tensor, _: Tensor, top: float) -> Tensor:
    scales = (maxima / top).clamp(HALF_LEAST, torch.finfo(torch.float16).max).half()
    return torch.where(maxima > 0, scales, torch.zeros_like(scales))


def _read_half(stored: Tensor, _limit: Tensor, _top: float) -> Tensor:
    return stored.float()


def _find_nothing(maxima: Tensor, _limit: Tensor, _top: float) -> Tensor:
    return torch.zeros_like(maxima, dtype=torch.uint8)


def _read_limit(stored: Tensor, limit: Tensor, top: float) -> Tensor:
    return (limit / top).expand(stored.shape)


def _bytes(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8)


SCALES: dict[str, ScaleRule] = {
    # array maximum over codeword maximum, in units of an outer scale (NVFP4; LO-BCQ "div")
    "e4m3": ScaleRule(_find_e4m3, _read_e4m3, 8, outer=True),
    # outer maximum over array maximum: what numbers are multiplied by (LO-BCQ "mul")
    "e4m3_inverse": ScaleRule(_find_inverse, _read_inverse, 8, outer=True),
    # a power of two (OCP Microscaling; block floating point)
    "e8m0": ScaleRule(_find_e8m0, _read_e8m0, 8, outer=False),
    # an integer times an outer scale (VS-Quant)
    "integer": ScaleRule(_find_integer, _read_integer, 8, outer=True, by_row=True),
    "float16": ScaleRule(_find_half, _read_half, 16, outer=False),
    # the outer scale alone
    "outer": ScaleRule(_find_nothing, _read_limit, 0, outer=True, by_row=True),
}
