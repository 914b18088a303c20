"""Reads a packed checkpoint back, strictly."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from claq_exp.checkpoint.manifest import check_harmless, check_manifest
from claq_exp.checkpoint.older import OLDEST, current_layout
from claq_exp.checkpoint.writer import FORMAT_VERSION, QUANT_METHOD
from claq_exp.errors import CheckpointError, ConfigError, telling_line
from claq_exp.models.ends import in_blocks, is_end
from claq_exp.payload import operand_of, read_layout, unpack_weight
from claq_exp.payload.base import Layout, Payload
from claq_exp.payload.gather import gathered
from claq_exp.quantize.activation.rounding import Rounding
from claq_exp.system.files import read_json
from claq_exp.tensor_files.shards import open_tensors, read_spans

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from claq_exp.models.stream import StreamedModel

CONFIG_KEYS = {"quant_method", "format_version", "modules"}


def read_layouts(folder: Path) -> dict[str, Layout]:
    """Return name -> layout from config.json: linears of blocks, and embedding and head if packed.

    Raises ConfigError when the folder is no checkpoint of ours, CheckpointError when it cannot be
    understood.
    """
    return _parse(folder)[0]


def read_rounding(folder: Path) -> Rounding | None:
    """Return how the inputs of packed layers are rounded, from config.json; raises as above."""
    return _parse(folder)[1]


def _parse(folder: Path) -> tuple[dict[str, Layout], Rounding | None]:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"checkpoint '{folder}' is no folder with a config.json")
    quantization = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise ConfigError(f"checkpoint '{folder}' is not quantized by claq_exp")
    try:
        layouts = parse_layouts(quantization)
        return layouts, parse_rounding(quantization, in_blocks(layouts))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def parse_layouts(quantization: Mapping[str, Any]) -> dict[str, Layout]:
    """Return linear name -> layout from a `quantization_config`.

    Raises CheckpointError for another format version, and for any key too many or too few.
    """
    version = quantization.get("format_version")
    if type(version) is not int or not OLDEST <= version <= FORMAT_VERSION:
        older = type(version) is int and version < OLDEST
        raise CheckpointError(
            f"it has format version {version}, this release reads {OLDEST} to "
            f"{FORMAT_VERSION}; {'quantize again' if older else 'update claq_exp'}"
        )
    known = CONFIG_KEYS | ({"activation"} if version > OLDEST else set())
    if unknown := sorted(set(quantization) - known):
        raise CheckpointError(f"quantization_config has an unknown key '{unknown[0]}'")
    modules = quantization.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise CheckpointError("quantization_config lists no quantized layers")
    return {name: _parse_layout(name, layout, version) for name, layout in modules.items()}


def parse_rounding(quantization: Mapping[str, Any], linears: Collection[str]) -> Rounding | None:
    """Return the rounding of activations from a `quantization_config`; linears: that are packed.

    Raises CheckpointError where it cannot be understood.
    """
    data = quantization.get("activation")
    return None if data is None else Rounding.from_json(data, linears)


def _parse_layout(name: str, data: Any, version: int) -> Layout:
    try:
        return read_layout(data if version == FORMAT_VERSION else current_layout(data, version))
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def check_checkpoint(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Layout]:
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


def _check_packed(folder: Path, layouts: Mapping[str, Layout]) -> None:
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


def read_weights(folder: Path) -> Iterator[tuple[str, Payload]]:
    """Yield (linear name, quantized weight), one at a time."""
    for name, layout, tensors in read_packed(folder):
        try:
            yield name, unpack_weight(layout, tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {name}: {error}") from error


def read_packed(folder: Path) -> Iterator[tuple[str, Layout, dict[str, Tensor]]]:
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


def unquantized_shapes(folder: Path, layouts: Mapping[str, Layout]) -> dict[str, tuple[int, ...]]:
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


class PackedWeights:
    """The weights of a checkpoint, each dequantized when it is read."""

    def __init__(
        self, folder: Path, layouts: Mapping[str, Layout], transposed: Collection[str]
    ) -> None:
        """Name a checkpoint.  transposed: linears that the model holds as [in, out]."""
        self._folder, self._layouts, self._transposed = folder, layouts, transposed
        self._files = {
            tensor: name for name, spans in read_spans(folder).items() for tensor in spans
        }

    def read(self, name: str) -> Tensor:
        """Return a parameter.  Raises CheckpointError for packed numbers that make no matrix."""
        linear = name.removesuffix(".weight")
        layout = self._layouts.get(linear)
        if layout is None or linear == name:
            return self._get(name)
        tensors = {s: self._get(f"{linear}.{s}") for s in layout.stored_tensors()}
        try:
            weight = unpack_weight(layout, tensors).dequantize()
        except CheckpointError as error:
            raise CheckpointError(f"{self._folder}: {linear}: {error}") from error
        return weight.t() if linear in self._transposed else weight

    def table(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return what looks rows of a parameter up: its codes stay packed.  Raises as `read`."""
        module = name.removesuffix(".weight")
        layout = self._layouts.get(module)
        if layout is None:
            return self.read(name).__getitem__
        tensors = {s: self._get(f"{module}.{s}") for s in layout.stored_tensors()}
        try:
            return partial(gathered, operand_of(layout, tensors))
        except CheckpointError as error:
            raise CheckpointError(f"{self._folder}: {module}: {error}") from error

    def _get(self, tensor: str) -> Tensor:
        if tensor not in self._files:
            raise CheckpointError(f"{self._folder} lacks the tensor {tensor}")
        path = self._folder / self._files[tensor]
        try:
            with safe_open(path, framework="pt") as file:
                found: Tensor = file.get_tensor(tensor)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return found


def load_model(
    folder: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint as a model with dense dequantized weights; as `open_checkpoint`."""
    return open_checkpoint(
        folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    ).load()


def open_checkpoint(
    folder: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    blocks_path: str | None = None,
    trust_remote_code: bool = False,
) -> StreamedModel:
    """Open a checkpoint as a model whose weights are dequantized block by block.

    It rounds activations as the checkpoint says.
    dtype: of weights and activations.  trust_remote_code: run code that came with the original
    model; packed weights hold none.  Raises ConfigError for a folder that is no checkpoint,
    CheckpointError for one that is damaged: a file that differs from the manifest, a tensor that is
    missing, left over or of another shape; NumericalError for one that `dtype` cannot hold.
    """
    from claq_exp.models.activations import round_inputs
    from claq_exp.models.load import DTYPES
    from claq_exp.models.stream import StreamedModel

    folder = Path(folder)
    layouts = check_checkpoint(folder, trust_remote_code=trust_remote_code)
    model = check_model(folder, layouts, DTYPES[dtype], trust_remote_code=trust_remote_code)
    check_dtype(folder, layouts, dtype)
    round_inputs(model, read_rounding(folder), in_blocks(layouts))
    weights = PackedWeights(folder, layouts, _transposed(model))
    return StreamedModel(model, weights, device, blocks_path)


def check_model(
    folder: Path,
    layouts: Mapping[str, Layout],
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the model of config.json without its weights, and compare it with the stored tensors.

    dtype: of its parameters, on the meta device.  Raises CheckpointError where config.json makes no
    model, or another one than the tensors belong to.
    """
    from claq_exp.models.skeleton import read_generation_config, skeleton

    kept = unquantized_shapes(folder, layouts)
    try:
        config = _read_config(folder, layers=len(layouts) + len(kept), trust=trust_remote_code)
        model = skeleton(config, dtype)
        _check_shapes(model, layouts, kept)
        read_generation_config(model, folder)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except Exception as error:  # what a config asks for can fail anywhere in a model's code
        raise CheckpointError(
            f"{folder}/config.json makes no model: {telling_line(error)}"
        ) from error
    return model


def check_dtype(folder: Path, layouts: Mapping[str, Layout], dtype: str) -> None:
    """Raise NumericalError for a tensor that is not packed, with a number beyond a dtype."""
    from claq_exp.models.load import DTYPES
    from claq_exp.models.stored_types import FLOATS, check_held

    kept = unquantized_shapes(folder, layouts)
    held_in = ((DTYPES[dtype], f"which dtype={dtype} asks for; choose float32"),)
    narrower = {
        name
        for spans in read_spans(folder).values()
        for name, span in spans.items()
        if name in kept and FLOATS.get(span.dtype, DTYPES[dtype]) != DTYPES[dtype]
    }
    if dtype == "float32" or not narrower:
        return
    with open_tensors(folder) as get:
        for name in sorted(narrower):
            check_held(name, get(name), held_in)


def _read_config(folder: Path, *, layers: int, trust: bool) -> PretrainedConfig:
    """Read config.json; `layers` tensors cannot make more decoder blocks."""
    from transformers import AutoConfig

    from claq_exp.models.towers import text_config

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    del config.quantization_config
    blocks = getattr(text_config(config), "num_hidden_layers", 0)
    if blocks > layers:
        raise CheckpointError(f"config.json asks for {blocks} blocks, the weights hold fewer")
    return config


def _transposed(model: PreTrainedModel) -> set[str]:
    """Return the linears whose weights are stored the other way round, as GPT-2's."""
    from transformers.pytorch_utils import Conv1D

    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}


def _check_shapes(
    model: PreTrainedModel,
    layouts: Mapping[str, Layout],
    kept: Mapping[str, tuple[int, ...]],
) -> None:
    """Compare the stored tensors with the model's; none may be missing or left over.

    kept: name -> shape of those that are not quantized, stored as they are.
    """
    from claq_exp.models.discover import LINEAR, linear_weight
    from claq_exp.models.skeleton import tied_names

    modules = dict(model.named_modules())
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for name in layouts:
        if is_end(name) and (name not in modules or modules[name] not in ends):
            raise CheckpointError(f"'{name}' is neither embedding nor head of the model")
        if not is_end(name) and not isinstance(modules.get(name), LINEAR):
            raise CheckpointError(f"the model has no linear layer '{name}'")
    packed = {f"{name}.weight": (w.rows, w.columns) for name, w in layouts.items()}
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    places = own | {f"{name}.weight": tuple(linear_weight(modules[name]).shape) for name in layouts}
    if twice := set(packed) & set(kept):
        raise CheckpointError(f"it has {min(twice)} packed and unpacked")
    stored = packed | dict(kept)
    for name, shape in stored.items():
        if name not in places or name in tied_names(model):
            raise CheckpointError(f"the model has no tensor '{name}'")
        if shape != places[name]:
            raise CheckpointError(f"the shape of {name} is {shape}, the model's {places[name]}")
    if missing := set(places) - set(tied_names(model)) - set(stored):
        raise CheckpointError(f"it lacks {len(missing)} tensors, e.g. {min(missing)}")
