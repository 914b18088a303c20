"""Reads a packed checkpoint back, strictly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from claq_exp.checkpoint.files import read_json
from claq_exp.checkpoint.manifest import check_harmless, check_manifest
from claq_exp.checkpoint.shards import open_tensors, read_spans
from claq_exp.checkpoint.writer import FORMAT_VERSION, QUANT_METHOD
from claq_exp.errors import CheckpointError, ConfigError, first_line
from claq_exp.quantize.layout import WeightLayout
from claq_exp.quantize.quantized import QuantizedWeight, unpack_weight

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

CONFIG_KEYS = {"quant_method", "format_version", "modules"}
LAYOUT_KEYS = {field.name for field in fields(WeightLayout)}


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
    try:
        return parse_layouts(quantization)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def parse_layouts(quantization: Mapping[str, Any]) -> dict[str, WeightLayout]:
    """Return linear name -> layout from a `quantization_config`.

    Raises CheckpointError for another format version, and for any key too many or too few.
    """
    version = quantization.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        older = type(version) is int and version < FORMAT_VERSION
        raise CheckpointError(
            f"it has format version {version}, this release reads {FORMAT_VERSION}; "
            f"{'quantize again' if older else 'update claq_exp'}"
        )
    if unknown := sorted(set(quantization) - CONFIG_KEYS):
        raise CheckpointError(f"quantization_config has an unknown key '{unknown[0]}'")
    modules = quantization.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise CheckpointError("quantization_config lists no quantized layers")
    return {name: _parse_layout(name, layout) for name, layout in modules.items()}


def _parse_layout(name: str, data: Any) -> WeightLayout:
    if not isinstance(data, dict) or set(data) != LAYOUT_KEYS:
        raise CheckpointError(f"the layout of {name} must have the keys {sorted(LAYOUT_KEYS)}")
    widths = data["columns_per_width"]
    if not isinstance(widths, dict) or not widths:
        raise CheckpointError(f"the layout of {name} has no columns_per_width")
    for width, columns in widths.items():
        if width not in ("1", "2", "3", "4", "5", "6", "7", "8") or type(columns) is not int:
            raise CheckpointError(f"the layout of {name} has columns of '{width}' bits: {columns}")
        if columns < 1:
            raise CheckpointError(f"the layout of {name} has {columns} columns of {width} bits")
    try:
        return WeightLayout.from_json(data)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def check_checkpoint(folder: Path, *, trust_remote_code: bool = False) -> dict[str, WeightLayout]:
    """Check everything that needs no model, and return linear name -> layout.

    Format version, layouts and their tensors, manifest, files that could run code.  Raises
    ConfigError for a folder that is no checkpoint or needs `trust_remote_code`, CheckpointError for
    one that is damaged.
    """
    layouts = read_layouts(folder)
    check_harmless(folder, trust_remote_code=trust_remote_code)
    check_manifest(folder)
    _check_packed(folder, layouts)
    return layouts


def _check_packed(folder: Path, layouts: Mapping[str, WeightLayout]) -> None:
    """Compare the tensors of quantized weights with their layouts, by the headers alone."""
    spans = {name: span for shard in read_spans(folder).values() for name, span in shard.items()}
    for linear, layout in layouts.items():
        for suffix, spec in layout.stored_tensors().items():
            name = f"{linear}.{suffix}"
            if name not in spans:
                raise CheckpointError(f"{folder} lacks the tensor {name}")
            found, asked = (spans[name].dtype, spans[name].shape), (spec.dtype, spec.shape)
            if found != asked:
                raise CheckpointError(
                    f"{folder}: {name} is {found[0]} {found[1]}, its layout asks for {asked[0]} "
                    f"{asked[1]}"
                )


def read_weights(folder: Path) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yield (linear name, quantized weight), one at a time."""
    for name, layout, tensors in read_packed(folder):
        try:
            yield name, unpack_weight(layout, tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {name}: {error}") from error


def read_packed(folder: Path) -> Iterator[tuple[str, WeightLayout, dict[str, Tensor]]]:
    """Yield (linear name, layout, tensors by suffix) of each quantized weight, as stored."""
    layouts = read_layouts(folder)
    with open_tensors(folder) as get:
        for name, layout in layouts.items():
            yield name, layout, {s: get(f"{name}.{s}") for s in layout.stored_tensors()}


def read_unquantized(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of everything that is no part of a quantized weight, as stored."""
    names = unquantized_shapes(folder, read_layouts(folder))
    with open_tensors(folder) as get:
        for name in sorted(names):
            yield name, get(name)


def unquantized_shapes(
    folder: Path, layouts: Mapping[str, WeightLayout]
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of everything that is no part of a quantized weight."""
    packed = {
        f"{name}.{suffix}" for name, layout in layouts.items() for suffix in layout.stored_tensors()
    }
    return {
        name: span.shape
        for spans in read_spans(folder).values()
        for name, span in spans.items()
        if name not in packed
    }


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
    from transformers import AutoModelForCausalLM

    from claq_exp.models.experts import split_experts
    from claq_exp.models.load import DTYPES

    folder = Path(folder)
    layouts = check_checkpoint(folder, trust_remote_code=trust_remote_code)
    config, generation = check_model(folder, layouts, trust_remote_code=trust_remote_code)
    with _making_a_model(folder):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code
        )
    if generation is not None:
        model.generation_config = generation
    split_experts(model)
    _fill(model, folder)
    model.tie_weights()
    return model.to(device).eval()


def check_model(
    folder: Path, layouts: Mapping[str, WeightLayout], *, trust_remote_code: bool = False
) -> tuple[PretrainedConfig, GenerationConfig | None]:
    """Build the model of config.json without its memory, and compare it with the stored tensors.

    Returns config.json and generation_config.json.  Raises CheckpointError where config.json makes
    no model, or another one than the tensors belong to.
    """
    from transformers import GenerationConfig

    from claq_exp.models.skeleton import skeleton

    kept = unquantized_shapes(folder, layouts)
    with _making_a_model(folder):
        config = _read_config(folder, layers=len(layouts) + len(kept), trust=trust_remote_code)
        _check_shapes(skeleton(config), layouts, kept)
        if not (folder / "generation_config.json").is_file():
            return config, None
        return config, GenerationConfig.from_pretrained(folder, local_files_only=True)


@contextmanager
def _making_a_model(folder: Path) -> Iterator[None]:
    """Turn whatever a config leads to into a CheckpointError that names the folder."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except Exception as error:
        raise CheckpointError(
            f"{folder}/config.json makes no model: {first_line(error)}"
        ) from error


def _read_config(folder: Path, *, layers: int, trust: bool) -> PretrainedConfig:
    """Read config.json; `layers` tensors cannot make more decoder blocks."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    del config.quantization_config
    blocks = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if blocks > layers:
        raise CheckpointError(f"config.json asks for {blocks} blocks, the weights hold fewer")
    return config


def _dense_places(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> tensor of a model's state, weights of linear layers as [out, in]."""
    from claq_exp.models.discover import LINEAR, linear_weight

    places = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, LINEAR):
            places[f"{name}.weight"] = linear_weight(module)
    return places


def _check_shapes(
    model: PreTrainedModel,
    layouts: Mapping[str, WeightLayout],
    kept: Mapping[str, tuple[int, ...]],
) -> None:
    """Compare the stored tensors with the model's; none may be missing or left over.

    kept: name -> shape of those that are not quantized, stored as they are.
    """
    from claq_exp.models.discover import LINEAR
    from claq_exp.models.skeleton import tied_names

    modules = dict(model.named_modules())
    if wrong := [name for name in layouts if not isinstance(modules.get(name), LINEAR)]:
        raise CheckpointError(f"the model has no linear layer '{wrong[0]}'")
    packed = {f"{name}.weight": (w.rows, w.columns) for name, w in layouts.items()}
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    places = own | {name: tuple(_dense_places(model)[name].shape) for name in packed}
    if twice := set(packed) & set(kept):
        raise CheckpointError(f"it has {min(twice)} packed and unpacked")
    stored = packed | dict(kept)
    for name, shape in stored.items():
        if name not in places or name in tied_names(model):
            raise CheckpointError(f"the model has no tensor '{name}'")
        if shape != places[name]:
            raise CheckpointError(f"the shape of {name} is {shape}, the model's {places[name]}")
    if missing := set(places) - tied_names(model) - set(stored):
        raise CheckpointError(f"it lacks {len(missing)} tensors, e.g. {min(missing)}")


@torch.no_grad()
def _fill(model: PreTrainedModel, folder: Path) -> None:
    """Copy every tensor of a checkpoint to its place, which `_check_shapes` has found."""
    places = model.state_dict()
    matrices = _dense_places(model)
    for name, weight in read_weights(folder):
        matrices[f"{name}.weight"].copy_(weight.dequantize())
    for name, tensor in read_unquantized(folder):
        places[name].copy_(tensor)
