"""Reads a packed checkpoint back, strictly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from claq_exp.checkpoint.files import check_manifest, read_json
from claq_exp.checkpoint.writer import FORMAT_VERSION, QUANT_METHOD, WEIGHTS_FILE
from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.quantize.layout import WeightLayout
from claq_exp.quantize.quantized import QuantizedWeight, unpack_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_layouts(folder: Path) -> dict[str, WeightLayout]:
    """Return linear name -> layout from config.json.

    Raises ConfigError when the folder is no checkpoint of ours, CheckpointError when it cannot be
    understood.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"checkpoint '{folder}' is no folder with a config.json")
    quantization = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise ConfigError(f"checkpoint '{folder}' is not quantized by claq_exp")
    version = quantization.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, this release reads {FORMAT_VERSION}; "
            "update claq_exp"
        )
    modules = quantization.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise CheckpointError(f"{folder} lists no quantized layers")
    try:
        return {name: WeightLayout.from_json(layout) for name, layout in modules.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def read_weights(folder: Path) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yield (linear name, quantized weight), one at a time."""
    with _open(folder) as file:
        for name, layout in read_layouts(folder).items():
            try:
                suffixes = layout.stored_tensors()
                tensors = {suffix: file.get_tensor(f"{name}.{suffix}") for suffix in suffixes}
                yield name, unpack_weight(layout, tensors)
            except (CheckpointError, SafetensorError) as error:
                raise CheckpointError(f"{folder}: {name}: {error}") from error


def read_unquantized(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of everything that is no part of a quantized weight, as stored."""
    layouts = read_layouts(folder).items()
    packed = {f"{name}.{suffix}" for name, layout in layouts for suffix in layout.stored_tensors()}
    with _open(folder) as file:
        for key in sorted(set(file.keys()) - packed):
            yield key, file.get_tensor(key)


def load_model(
    folder: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint as a model with dense dequantized weights.

    dtype: of weights and activations.  trust_remote_code: run code that came with the original
    model; packed weights hold none.  Raises ConfigError for a folder that is no checkpoint,
    CheckpointError for one that is damaged: a file that differs from the manifest, a tensor that is
    missing, left over or of another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from claq_exp.models.load import DTYPES

    folder = Path(folder)
    read_layouts(folder)
    check_manifest(folder)
    remote = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **remote)
    del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], **remote)
    _fill(model, folder)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval()


@torch.no_grad()
def _fill(model: PreTrainedModel, folder: Path) -> None:
    """Copy every tensor of a checkpoint to its place; none may be missing or left over."""
    from claq_exp.models.discover import LINEAR, linear_weight
    from claq_exp.models.skeleton import tied_names

    places = model.state_dict()
    modules = dict(model.named_modules())
    missing = set(places) - tied_names(model)

    def copy(name: str, place: Tensor | None, tensor: Tensor) -> None:
        if place is None or name not in missing:
            raise CheckpointError(f"{folder}: the model has no tensor '{name}'")
        if place.shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, the model's {tuple(place.shape)}"
            raise CheckpointError(f"{folder}: the shape of {name} is {shapes}")
        place.copy_(tensor)
        missing.remove(name)

    for name, weight in read_weights(folder):
        module = modules.get(name)
        place = linear_weight(module) if isinstance(module, LINEAR) else None
        copy(f"{name}.weight", place, weight.dequantize())
    for name, tensor in read_unquantized(folder):
        copy(name, places.get(name), tensor)
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors, e.g. {min(missing)}")


def _open(folder: Path) -> Any:
    try:
        return safe_open(folder / WEIGHTS_FILE, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from error
