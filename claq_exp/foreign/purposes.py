"""What a stored tensor of a linear layer is for, by the names that its owner gives it."""

from __future__ import annotations

import re
from typing import Any

from claq_exp.foreign.headers import Stored
from claq_exp.tensor_files.shards import ITEM_BYTES

CODES, CODEBOOKS, SCALES, ZEROS = "codes", "codebooks", "scales", "zeros"
PERMUTATIONS, BLOCKS, DENSE, DESCRIPTIONS = "permutations", "blocks", "dense", "descriptions"
UNKNOWN, UNQUANTIZED = "unknown", "unquantized"
OF_LINEARS = (  # accounts that make up the linear bits
    *(CODES, CODEBOOKS, SCALES, ZEROS, PERMUTATIONS, BLOCKS, DENSE, DESCRIPTIONS, UNKNOWN),
)
FLOAT_BITS = {kind: 8 * ITEM_BYTES[kind] for kind in ("F16", "BF16", "F32", "F64")}
NAMES = (  # the first that fits; of a suffix behind the layer's name
    (DESCRIPTIONS, r"quant_state\.|_(shape|format)$|^(shape|nbits|axis|group_size|packing|meta)\b"),
    (PERMUTATIONS, r"g_idx|perm"),
    (ZEROS, r"zero"),
    (CODEBOOKS, r"codebook|quant_map|\blut\b|centroids|grid"),
    (SCALES, r"scale|absmax|\bSCB\b|nested_offset|_norm$"),
    (CODES, r"qweight|weight_packed|W_q|codes|qdata|indices|_blocks$|quantized_weight|_data$"),
)


def purpose(stored: Stored, suffix: str, *, gguf: bool) -> str:
    """Return the account of a tensor of a linear layer.

    suffix: its name behind that of the layer, e.g. `qzeros`, or `weight.absmax`.
    """
    if suffix == "bias":
        return UNQUANTIZED
    if suffix == "weight":
        if stored.kind in FLOAT_BITS:
            return DENSE
        return BLOCKS if gguf else CODES
    for account, pattern in NAMES:
        if re.search(pattern, suffix):
            return account
    return UNKNOWN


def code_bits(quantization: dict[str, Any], name: str) -> float | None:
    """Return the bits of a code that a quantization_config states for a layer, or None.

    Exceptions for single layers count (`extra_config` of AutoRound, `dynamic` of GPTQModel).
    """
    for bits in (_exception(quantization, name), *map(quantization.get, ("bits", "w_bit"))):
        if isinstance(bits, int):
            return float(bits)
    for bits in (4, 8):
        if quantization.get(f"load_in_{bits}bit"):
            return float(bits)
    for read in (_compressed_tensors, _aqlm, _hqq, _torchao):
        stated = read(quantization)
        if stated is not None:
            return stated
    return 8.0 if "fp8" in str(quantization.get("quant_method")) else None


def type_bits(kind: str) -> float | None:
    """Return the bits of a code of a GGUF type, by its name: 4 of `Q4_K`; None where it has none.

    Types below two bits are named by their bits in all, rounded down.
    """
    found = re.match(r"(?:[IT]?Q|MXFP|NVFP)(\d+)_?|[BF]*F(\d+)", kind)
    return None if found is None else float(found[1] or found[2])


def _exception(quantization: dict[str, Any], name: str) -> Any:
    extra = quantization.get("extra_config")
    if isinstance(extra, dict) and isinstance(extra.get(name), dict):
        return extra[name].get("bits")
    dynamic = quantization.get("dynamic")
    for pattern, changed in dynamic.items() if isinstance(dynamic, dict) else ():
        if pattern.startswith("-:") or not isinstance(changed, dict):
            continue
        try:
            if re.match(pattern.removeprefix("+:"), name):
                return changed.get("bits")
        except re.error:
            continue
    return None


def _compressed_tensors(quantization: dict[str, Any]) -> float | None:
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict):
        return None
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    found = {weight.get("num_bits") for weight in weights if isinstance(weight, dict)}
    return _number(found.pop()) if len(found) == 1 else None


def _aqlm(quantization: dict[str, Any]) -> float | None:
    bits = [_number(quantization.get(k)) for k in ("num_codebooks", "nbits_per_codebook")]
    group = _number(quantization.get("in_group_size"))
    rows = _number(quantization.get("out_group_size")) or 1.0
    if not bits[0] or not bits[1] or not group:
        return None
    return bits[0] * bits[1] / (group * rows)


def _hqq(quantization: dict[str, Any]) -> float | None:
    settings = quantization.get("quant_config")
    weights = settings.get("weight_quant_params") if isinstance(settings, dict) else None
    return _number(weights.get("nbits")) if isinstance(weights, dict) else None


def _torchao(quantization: dict[str, Any]) -> float | None:
    kind = quantization.get("quant_type")
    default = kind.get("default") if isinstance(kind, dict) else kind
    name = default.get("_type") if isinstance(default, dict) else default
    found = re.search(r"(?:[iI]nt|[fF]loat|UIntX?)(\d+)\D*Weight|(?:int|float)(\d+)", str(name))
    return float(found[1] or found[2]) if found else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
