"""Where each parameter of a model lies on disk, and how one is read without the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from claq_exp.errors import CheckpointError, SourceError
from claq_exp.models.experts import FUSED, SeparateExperts
from claq_exp.sources.weight_files import weight_files
from claq_exp.tensor_files.shards import TensorSpan, read_header

COMPARED = 1 << 22  # numbers of two tensors that are compared at a time


class Weights(Protocol):
    """Reads parameters by their names in a model whose experts are split."""

    def read(self, name: str) -> Tensor:
        """Return a parameter as the model holds it, in its stored type, on the CPU.

        It may be mapped from a file: only what is touched is read.
        """

    def table(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return what looks rows of a parameter up, as `read` has them: [n] int64 -> [n, width].

        The others are not decoded.
        """


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of a file; of fused experts' tensor only this expert's rows, from `first` on."""

    file: Path
    key: str
    expert: int | None = None
    first: int = 0
    rows: int = 0

    def read(self) -> Tensor:
        """Return the tensor, mapped.  Raises SourceError when its file cannot be read."""
        with self._opened() as file:
            if self.expert is None:
                found: Tensor = file.get_tensor(self.key)
                return found
            expert: Tensor = file.get_slice(self.key)[self.expert]
            return expert[self.first : self.first + self.rows]

    def same_as(self, other: TensorPlace) -> bool:
        """Tell whether two whole tensors hold the same numbers; reads no more than it must."""
        if (self.file, self.key) == (other.file, other.key):
            return True
        one, two = self.read(), other.read()
        pieces = (tensor.reshape(-1).split(COMPARED) for tensor in (one, two))
        return one.shape == two.shape and all(
            bool((a == b).all()) for a, b in zip(*pieces, strict=True)
        )

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self.file, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise SourceError(f"{self.file} cannot be read: {error}") from error


class StoredWeights:
    """The weights of a Hugging Face folder."""

    def __init__(self, places: Mapping[str, TensorPlace]) -> None:
        self._places = places

    def read(self, name: str) -> Tensor:
        """Return a parameter, mapped.  Raises SourceError when its file cannot be read."""
        return self._places[name].read()

    def table(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return what looks rows of a parameter up, see Weights."""
        return self.read(name).__getitem__

    def __iter__(self) -> Iterator[str]:
        """Go over the names of all tensors as they are stored, experts in one piece."""
        return (name for name, place in self._places.items() if place.expert is None)


def stored_tensors(folder: Path) -> dict[str, tuple[Path, TensorSpan]]:
    """Return tensor -> (file, span) of all weights of a folder, from their headers.

    Of a tensor that is in two files the one counts that the index names.
    Raises ConfigError for a folder without weights, SourceError for files that cannot be read.
    """
    weights = weight_files(folder)
    listed = weights.places or {}
    found: dict[str, tuple[Path, TensorSpan]] = {}
    try:
        for file in weights.files:
            name = file.relative_to(folder).as_posix()
            for tensor, span in read_header(file).items():
                if tensor not in found or listed.get(tensor) == name:
                    found[tensor] = (file, span)
    except CheckpointError as error:
        raise SourceError(str(error)) from error
    return found


def placed(
    model: PreTrainedModel, stored: Mapping[str, tuple[Path, TensorSpan]]
) -> tuple[dict[str, TensorPlace], dict[str, str]]:
    """Find the parameters that are stored as the model holds them, by transformers' own renaming.

    Returns parameter -> place, and tensor -> what it would be called in the model, of those that no
    parameter takes.  What transformers must convert is in neither.
    Raises SourceError for a tensor of another shape.
    """
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found: dict[str, TensorPlace] = {}
    left_over: dict[str, str] = {}
    for key in sorted(stored, key=lambda key: (key not in state, dot_natural_key(key))):
        around = (model.base_model_prefix, state)
        name, converter = rename_source_key(key, renamings, converters, *around)
        if name not in state:  # it is called as in the model, or lacks a prefix
            alone, _ = rename_source_key(key, [], [], *around)
            name, converter = (alone, None) if alone in state else (name, converter)
        if name not in state or name in found:
            left_over[key] = name
        elif converter is None:
            file, span = stored[key]
            shape = tuple(state[name].shape)
            if span.shape != shape:
                raise SourceError(
                    f"{file} holds tensors of another shape than its config: {key} is "
                    f"{list(span.shape)}, the model's {list(shape)}"
                )
            found[name] = TensorPlace(file, key)
    return found, left_over


def renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """Return what gives a stored tensor the name that this release of transformers has for it.

    Tensors that transformers joins keep names of their own.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    around = (model.base_model_prefix, model.state_dict())
    return lambda name: rename_source_key(name, renamings, [], *around)[0]


def expert_places(model: nn.Module, fused: Mapping[str, TensorPlace]) -> dict[str, TensorPlace]:
    """Return the places of split experts inside the fused tensors."""
    places = {}
    for path, module in model.named_modules():
        if not isinstance(module, SeparateExperts):
            continue
        gate_up, down = (fused[f"{path}.{name}"] for name in FUSED)
        for index in range(len(module)):
            for name, layer in module[index].named_children():
                if isinstance(layer, nn.Linear):
                    whole = down if name == "down_proj" else gate_up
                    rows = layer.out_features
                    first = rows if name == "up_proj" else 0
                    place = TensorPlace(whole.file, whole.key, index, first, rows)
                    places[f"{path}.{index}.{name}.weight"] = place
    return places
