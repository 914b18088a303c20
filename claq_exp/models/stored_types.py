"""The number types that a model's tensors are stored in, and what cannot be held in another one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from claq_exp.errors import ConfigError, NumericalError
from claq_exp.models.towers import text_config
from claq_exp.tensor_files.shards import TensorSpan

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
    for part in (config, text_config(config)):
        if getattr(part, "quantization_config", None) or getattr(part, "compression_config", None):
            raise ConfigError(f"{folder} is already quantized; {give}")
    for name in stored:
        if QUANTIZED.search(name) and name not in names:
            raise ConfigError(f"{folder} is already quantized: it stores {name}; {give}")
    for name, (_, span) in stored.items():
        if span.dtype not in FLOATS and (name in names or name.endswith((".weight", "_proj"))):
            raise ConfigError(
                f"{folder} stores {name} as {span.dtype}, which is no plain floating type: it is "
                f"already quantized, or damaged; {give}"
            )


def check_held(name: str, weight: Tensor, held_in: Iterable[tuple[torch.dtype, str]]) -> bool:
    """Raise NumericalError where a tensor is not finite, or has a number beyond a type.

    Returns whether its numbers are too small for a type, so that more than rounding is lost.
    held_in: types, and the end of the sentence about each: who asks for it, and what to change.
    """
    if not weight.is_floating_point() or weight.numel() == 0:
        return False
    ends = torch.stack(torch.aminmax(weight))  # NaN carries over
    if not torch.isfinite(ends).all():
        found = _first(weight, ~torch.isfinite(weight))
        raise NumericalError(f"{name}{found}; repair the model's weights")
    types = dict(held_in)
    for dtype, asked in types.items():
        if not torch.isfinite(ends.to(dtype)).all():
            found = _first(weight, ~torch.isfinite(weight.to(dtype)))
            raise NumericalError(f"{name}{found}, beyond {_short(dtype)}, {asked}")
    narrow = torch.float16 in types and weight.dtype != torch.float16
    return narrow and _change(weight, torch.float16) > LOST


def fits_float16(weights: Iterable[Tensor]) -> bool:
    """Tell whether float16 can hold finite tensors, within rounding."""
    try:
        return not any(check_held("", weight, ((torch.float16, ""),)) for weight in weights)
    except NumericalError:
        return False


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
