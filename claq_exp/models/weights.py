"""Where each parameter of a model lies on disk, and how one is read without the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from claq_exp.checkpoint.files import read_json
from claq_exp.checkpoint.shards import INDEX_FILE, WEIGHTS_FILE, TensorSpan, read_header
from claq_exp.errors import CheckpointError, NumericalError, SourceError, first_line
from claq_exp.models.experts import FUSED, SeparateExperts, split_experts
from claq_exp.models.skeleton import skeleton, tied_names


class Weights(Protocol):
    """Reads parameters by their names in a model whose experts are split."""

    def read(self, name: str) -> Tensor:
        """Return a parameter as the model holds it, in its stored type, on the CPU.

        It may be mapped from a file: only what is touched is read.
        """


@dataclass(frozen=True)
class Place:
    """A tensor of a file; of fused experts' tensor only this expert's rows, from `first` on."""

    file: Path
    key: str
    expert: int | None = None
    first: int = 0
    rows: int = 0


class StoredWeights:
    """The weights of a Hugging Face folder."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = places

    def read(self, name: str) -> Tensor:
        """Return a parameter, mapped.  Raises SourceError when its file cannot be read."""
        place = self._places[name]
        try:
            with safe_open(place.file, framework="pt") as file:
                if place.expert is None:
                    return file.get_tensor(place.key)
                expert: Tensor = file.get_slice(place.key)[place.expert]
                return expert[place.first : place.first + place.rows]
        except (OSError, SafetensorError) as error:
            raise SourceError(f"{place.file} cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        """Go over the names of all tensors as they are stored, experts in one piece."""
        return (name for name, place in self._places.items() if place.expert is None)


def stored_weights(
    folder: Path, config: PretrainedConfig, work: Path, *, trust_remote_code: bool = False
) -> StoredWeights:
    """Find the weights of a Hugging Face folder for the model of its config.

    work: folder for what transformers must convert first: experts stored one by one, and names of
    older releases.  Raises SourceError when a tensor is missing or has another shape.
    """
    model = skeleton(config, split=False)
    tied = tied_names(model)
    wanted = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied
    }
    found = _as_stored(_stored(folder), wanted, model.base_model_prefix)
    if missing := [name for name in wanted if name not in found]:
        found = _converted(folder, model, missing, work, trust_remote_code)
    places = {name: place for name, place in found.items() if name in wanted}
    split_experts(model)
    return StoredWeights(places | _experts(model, places))


def check_finite(weights: StoredWeights) -> None:
    """Read every weight once.  Raises NumericalError that names the first that is not finite."""
    for name in weights:
        weight = weights.read(name)
        if not weight.is_floating_point() or weight.numel() == 0:
            continue
        ends = torch.stack(torch.aminmax(weight))  # NaN carries over
        if not torch.isfinite(ends).all():
            place = torch.nonzero(~torch.isfinite(weight))[0].tolist()
            value = weight[tuple(place)].item()
            raise NumericalError(f"{name}{place} is {value}; repair the model's weights")


def _stored(folder: Path) -> dict[str, tuple[Path, TensorSpan]]:
    """Return tensor -> (file, span), of the files that a folder's index names, if it has one."""
    try:
        if not (folder / INDEX_FILE).is_file():
            files = [folder / WEIGHTS_FILE]
            listed = None
        else:
            listed = read_json(folder / INDEX_FILE).get("weight_map")
            if not isinstance(listed, dict):
                raise SourceError(f"{folder / INDEX_FILE} has no weight_map")
            names = {Path(str(name)).name for name in listed.values()}
            files = [folder / name for name in sorted(names)]
        return {
            name: (file, span)
            for file in files
            for name, span in read_header(file).items()
            if listed is None or listed.get(name) == file.name
        }
    except CheckpointError as error:
        raise SourceError(str(error)) from error


def _as_stored(
    stored: Mapping[str, tuple[Path, TensorSpan]],
    wanted: Mapping[str, tuple[int, ...]],
    prefix: str,
) -> dict[str, Place]:
    """Find tensors that are stored as the model names them, or without its prefix, or with one."""
    found = {}
    for name, shape in wanted.items():
        names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        key = next((key for key in names if key in stored), None)
        if key is None:
            continue
        file, span = stored[key]
        if span.shape != shape:
            raise SourceError(
                f"{file} holds tensors of another shape than its config: {name} is "
                f"{list(span.shape)}, the model's {list(shape)}"
            )
        found[name] = Place(file, key)
    return found


def _converted(
    folder: Path, model: PreTrainedModel, missing: list[str], work: Path, trust_remote_code: bool
) -> dict[str, Place]:
    """Have transformers bring the tensors into the form of this release, on disk."""
    lacking = f"{folder} lacks {len(missing)} tensors of its model, e.g. {missing[0]}"
    try:
        factory: Any = type(model)
        loaded, report = factory.from_pretrained(
            folder,
            device_map={"": "disk"},
            offload_folder=work,
            dtype=model.dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the message can name the tensor
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise SourceError(f"{lacking} ({first_line(error)})") from error
    if mismatched := sorted(str(key) for key in report["mismatched_keys"]):
        raise SourceError(
            f"{folder} holds tensors of another shape than its config: {mismatched[0]}"
        )
    if missing := sorted(report["missing_keys"]):
        raise SourceError(f"{folder} lacks {len(missing)} tensors of its model, e.g. {missing[0]}")
    hooks = (getattr(module, "_hf_hook", None) for module in loaded.modules())
    maps = (getattr(hook, "weights_map", None) for hook in hooks)
    index = next(found.dataset.index for found in maps if found is not None)
    return {
        name: Place(Path(entry["safetensors_file"]), entry.get("weight_name", name))
        for name, entry in index.items()
    }


def _experts(model: nn.Module, fused: Mapping[str, Place]) -> dict[str, Place]:
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
                    place = Place(whole.file, whole.key, index, first, rows)
                    places[f"{path}.{index}.{name}.weight"] = place
    return places
