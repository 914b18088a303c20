"""Makes transformers load and save packed checkpoints by itself, once this is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from claq_exp.checkpoint.reader import parse_layouts, parse_rounding
from claq_exp.checkpoint.writer import QUANT_METHOD
from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.models.activations import round_inputs
from claq_exp.models.discover import LINEAR, linear_weight
from claq_exp.models.ends import in_blocks, is_end
from claq_exp.models.experts import split_experts
from claq_exp.payload.base import Layout
from claq_exp.runtime.embedding import QuantizedEmbedding
from claq_exp.runtime.linear import QuantizedLinear


class ClaqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint: version, layouts, and rounding of activations.

    Raises CheckpointError for another version, and for any key too many or too few.
    """

    def __init__(
        self,
        format_version: int,
        modules: Mapping[str, Any],
        quant_method: str = QUANT_METHOD,
        **others: Any,
    ) -> None:
        described = {"format_version": format_version, "modules": modules, **others}
        self.layouts = parse_layouts(described)
        self.rounding = parse_rounding(described, in_blocks(self.layouts))
        self._others = others
        self.quant_method = quant_method  # type: ignore[assignment]  # not one of theirs
        self.format_version = format_version
        self.modules = dict(modules)

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "modules": self.modules,
            **self._others,
        }


class ClaqQuantizer(HfQuantizer):
    """Puts packed layers in the place of linear ones before the weights are read."""

    requires_calibration = True
    quantization_config: ClaqConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        split_experts(model)
        layouts = self.quantization_config.layouts
        places = places_of(model, in_blocks(layouts))
        pack_linears(model, {place: layouts[name] for name, place in places.items()})
        round_inputs(model, self.quantization_config.rounding, places, places)
        ends = {name: layout for name, layout in layouts.items() if is_end(name)}
        pack_ends(model, {place: ends[name] for name, place in places_of(model, ends).items()})

    def is_serializable(self) -> bool:
        """A loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed weights can be trained; packed weights have no gradients."""
        return True


def places_of(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return name -> where a layer stands in a model with another head, or none, than the original.

    Names are those of the causal language model: its base model lacks their first part, as with
    stored tensors, which transformers finds in the same way.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = {name for name, _ in model.named_modules()}
    places = {}
    for name in names:
        other = name.removeprefix(prefix)
        places[name] = other if name not in modules and other in modules else name
    return places


def pack_linears(model: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Replace linear layers by packed ones of the same shape, their tensors yet to be filled.

    layouts: name of each layer -> layout.  Raises CheckpointError for a layer that is not there or
    has another shape.
    """
    for name, layout in layouts.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, LINEAR):
            raise CheckpointError(f"the model has no linear layer '{name}'")
        _check_shape(name, layout, tuple(linear_weight(linear).shape))
        packed = QuantizedLinear(
            layout,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        _replace(model, name, packed)


def pack_ends(model: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Replace an embedding and a head by packed ones, their tensors yet to be filled.

    A head that is tied to a packed embedding multiplies by its table.  A head that the model has
    not, as with another one, is left out.
    layouts: name of each -> layout.  Raises CheckpointError for an embedding that is not there, or
    for another shape.
    """
    modules = dict(model.named_modules())
    for name, layout in layouts.items():
        module = modules.get(name)
        if isinstance(module, nn.Embedding):
            _check_shape(name, layout, tuple(module.weight.shape))
            dtype, device = module.weight.dtype, module.weight.device
            packed = QuantizedEmbedding(layout, module, dtype=dtype, device=device)
            _replace(model, name, packed)
            _share(model, name, packed)
        elif isinstance(module, LINEAR):
            pack_linears(model, {name: layout})
        elif module is not None:
            raise CheckpointError(f"{name} is neither an embedding nor a head of the model")
    for part in _models(model).values() if layouts else ():
        part.resize_token_embeddings = _refuse_resizing


def _share(model: nn.Module, name: str, embedding: QuantizedEmbedding) -> None:
    """Have the heads that are tied to an embedding multiply by its table, and untie them."""
    tied = getattr(model, "all_tied_weights_keys", {})
    weights = [key for key, source in tied.items() if source == f"{name}.weight"]
    for weight in weights:
        place = weight.removesuffix(".weight")
        head = model.get_submodule(place)
        if not isinstance(head, nn.Linear):
            raise CheckpointError(f"{place} shares the packed {name}, and is no linear layer")
        shared = QuantizedLinear(
            embedding.layout,
            bias=head.bias is not None,
            dtype=head.weight.dtype,
            device=head.weight.device,
            shared=embedding,
        )
        _replace(model, place, shared)
    for path, part in _models(model).items():  # each has a list, by names of its own
        own = part.all_tied_weights_keys
        left = {k: v for k, v in own.items() if f"{path}.{k}".lstrip(".") not in weights}
        part.all_tied_weights_keys = part._tied_weights_keys = left


def _models(model: nn.Module) -> dict[str, Any]:
    """Return the models of transformers that a model consists of, itself included, by name."""
    from transformers import PreTrainedModel  # not before it is asked for: see `_register`

    return {name: m for name, m in model.named_modules() if isinstance(m, PreTrainedModel)}


def _refuse_resizing(*_: Any, **__: Any) -> NoReturn:
    raise ConfigError(
        "a packed embedding or head cannot be resized; write dense ones with claq-exp export, "
        "and resize those"
    )


def _check_shape(name: str, layout: Layout, shape: tuple[int, ...]) -> None:
    if shape != (layout.rows, layout.columns):
        raise CheckpointError(
            f"{name} is {layout.rows} x {layout.columns}, the model's layer {shape[0]} x {shape[1]}"
        )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _register() -> None:
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(ClaqConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(ClaqQuantizer)


_register()  # while imported, for transformers may be on its way in because of this module
