"""The number types that a model's tensors are stored in, and what cannot be held in another one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from claq_exp.checkpoint.shards import TensorSpan
from claq_exp.errors import ConfigError, NumericalError

FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# Tensors that other quantizers store beside, or in the place of, a weight.
QUANTIZED = re.compile(
    r"(\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv|_2)?|weight_zero_point|SCB|W_q|absmax"
    r"|quant_map|quant_state\..+|weight\._(data|scale)|codebooks)|_proj_(blocks|scales))$"
)
LOST = 0.01  # relative change of a tensor that is no rounding: its numbers are too small for a type
PIECE = 1 << 22


def refuse_quantized(
    folder: Path,
    config: PretrainedConfig,
    stored: Mapping[str, tuple[Path, TensorSpan]],
    names: Collection[str],
) -> None:
    """Raise ConfigError for a model that is quantized already.

    Its config says so, or a stored tensor does: one that another quantizer leaves, or a parameter
    in a type that is no plain floating one.
    names: of what is no whole number in the model.
    """
    give = "give the original model"
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) or getattr(part, "compression_config", None):
            raise ConfigError(f"{folder} is already quantized; {give}")
    for name in stored:
        if QUANTIZED.search(name) and name not in names:
            raise ConfigError(f"{folder} is already quantized: it stores {name}; {give}")
    for name, (_, span) in stored.items():
        if span.dtype not in FLOATS and (name in names or name.endswith((".weight", "_proj"))):
            raise ConfigError(
                f"{folder} stores {name} as {span.dtype}, so that it is already quantized; {give}"
            )


def check_held(name: str, weight: Tensor, held_in: Iterable[tuple[torch.dtype, str]]) -> None:
    """Raise NumericalError where a tensor is not finite, or some type cannot hold it.

    held_in: types, and the end of the sentence about each: who asks for it, and what to change.
    """
    if not weight.is_floating_point() or weight.numel() == 0:
        return
    ends = torch.stack(torch.aminmax(weight))  # NaN carries over
    if not torch.isfinite(ends).all():
        found = _first(weight, ~torch.isfinite(weight))
        raise NumericalError(f"{name}{found}; repair the model's weights")
    for dtype, asked in held_in:
        if not torch.isfinite(ends.to(dtype)).all():
            found = _first(weight, ~torch.isfinite(weight.to(dtype)))
            raise NumericalError(f"{name}{found}, beyond {_short(dtype)}, {asked}")
        if dtype == torch.float16 != weight.dtype and _change(weight, dtype) > LOST:
            raise NumericalError(
                f"{name} holds numbers of {ends.abs().max().item():.3g} and less, too small for "
                f"{_short(dtype)}, {asked}"
            )


def _first(weight: Tensor, wrong: Tensor) -> str:
    place = torch.nonzero(wrong)[0].tolist()
    return f"{place} is {weight[tuple(place)].item():g}"


def _change(weight: Tensor, dtype: torch.dtype) -> float:
    """Return how far a tensor is from itself in another type, relative to its norm."""
    change = norm = 0.0
    for piece in weight.reshape(-1).split(PIECE):
        exact = piece.double()
        change += float((piece.to(dtype).double() - exact).square().sum())
        norm += float(exact.square().sum())
    return (change / norm) ** 0.5 if norm else 0.0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
