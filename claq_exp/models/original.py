"""The model that a folder holds: its config, and what its stored tensors say beside that."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel

from claq_exp.errors import SourceError, telling_line
from claq_exp.models.experts import split_experts
from claq_exp.models.skeleton import skeleton, tied_names
from claq_exp.models.stored_types import FLOATS, refuse_quantized
from claq_exp.models.towers import text_config
from claq_exp.models.unused import unused_tensors
from claq_exp.models.weights import (
    StoredWeights,
    TensorPlace,
    expert_places,
    placed,
    stored_tensors,
)
from claq_exp.sources.notes import source_losses, source_notes
from claq_exp.sources.weight_files import adapter_beside, has_weights, weight_files
from claq_exp.tensor_files.shards import TensorSpan

Stored = Mapping[str, tuple[Path, TensorSpan]]
EXAMPLES = 20  # names of unused tensors in results.json


@dataclass(frozen=True)
class Original:
    """A model as its folder holds it.

    config: that of the folder, with the ties and the dtype of the stored tensors.
    places: where each tensor lies; of those that it lacks transformers must make them.
    untied: parameters that config.json ties to another one, and that are stored unlike it.
    unused: stored tensors that no parameter takes.
    adapter: a file of an adapter beside the model, which is not applied.
    too_small: tensors that a type which they meet rounds to nothing; known once all were read.
    """

    folder: Path
    config: PretrainedConfig
    places: Mapping[str, TensorPlace]
    untied: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    adapter: str | None = None
    too_small: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return what results.json says of it."""
        return {
            "untied": list(self.untied),
            "unused_tensors": len(self.unused),
            "unused_examples": list(self.unused[:EXAMPLES]),
            "adapter": self.adapter,
            "too_small": len(self.too_small),
            "too_small_examples": list(self.too_small[:EXAMPLES]),
        }

    def remarks(self) -> list[str]:
        """Return a sentence for each thing that a person must know of the stored tensors."""
        return source_notes(self.as_dict())


def check_strictly(original: Original) -> None:
    """Raise SourceError where another model than the stored one would be quantized."""
    for loss in source_losses(original.as_dict()):
        raise SourceError(f"{original.folder}: strict=true, and {loss}")


def look(folder: Path, config: PretrainedConfig) -> Original:
    """Compare a config with the stored tensors, by their headers and those that it ties.

    Where there are no weights, or none in safetensors, the config alone is told.
    Raises ConfigError for a model that is quantized already, SourceError for a tensor of another
    shape.
    """
    config = copy.deepcopy(config)
    if not has_weights(folder) or weight_files(folder).pickled:
        refuse_quantized(folder, config, {}, ())
        return Original(folder, config, {})
    stored = stored_tensors(folder)
    if not isinstance(config.dtype, torch.dtype):
        config.dtype = _most_stored(stored)
    model = skeleton(config, split=False)
    state = model.state_dict()
    refuse_quantized(folder, config, stored, {n for n, t in state.items() if t.is_floating_point()})
    places, left_over = placed(model, stored)
    tied = tied_names(model)
    untied = _stored_apart(tied, places)
    if untied:
        model = _untie(config, folder, untied)
    for name, other in tied.items():
        if name in places or other in places:
            places.setdefault(name, places.get(other) or places[name])
            places.setdefault(other, places[name])
    left_out = tied_names(model)
    places = {name: place for name, place in places.items() if name not in left_out}
    unused = unused_tensors(model, left_over)
    return Original(folder, config, places, untied, unused, adapter_beside(folder))


def weights_of(original: Original, work: Path, *, trust_remote_code: bool = False) -> StoredWeights:
    """Return the weights of a model.

    work: folder for what transformers must convert first: experts stored one by one, and names of
    older releases.  Raises SourceError when a tensor is missing or has another shape.
    """
    model = skeleton(original.config, split=False)
    wanted = [name for name in model.state_dict() if name not in tied_names(model)]
    places = original.places
    if missing := [name for name in wanted if name not in places]:
        places = _converted(original, model, missing, work, trust_remote_code)
    places = {name: places[name] for name in wanted if name in places}
    split_experts(model)
    return StoredWeights(places | expert_places(model, places))


def _stored_apart(tied: Mapping[str, str], places: Mapping[str, TensorPlace]) -> tuple[str, ...]:
    """Return the tied parameters that are stored beside the other one, and unlike it."""
    both = [name for name, other in tied.items() if name in places and other in places]
    return tuple(name for name in both if not places[name].same_as(places[tied[name]]))


def _untie(config: PretrainedConfig, folder: Path, untied: Collection[str]) -> PreTrainedModel:
    """Have a config say that parameters are not tied, and return its model."""
    for part in (config, text_config(config)):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    model = skeleton(config, split=False)
    if still := [name for name in untied if name in tied_names(model)]:
        raise SourceError(
            f"{folder} stores {still[0]}, which its model ties to {tied_names(model)[still[0]]}, "
            "with other numbers; take out the one that is not meant"
        )
    return model


def _most_stored(stored: Stored) -> torch.dtype | None:
    """Return the floating type that most numbers are stored in."""
    counts: Counter[str] = Counter()
    for _, span in stored.values():
        if span.dtype in FLOATS:
            counts[span.dtype] += math.prod(span.shape)
    return FLOATS[counts.most_common(1)[0][0]] if counts else None


def _perhaps_tied(model: PreTrainedModel, missing: list[str]) -> str:
    """Say what to do where a head is missing that may have been tied to the embedding."""
    head = model.get_output_embeddings()
    names = [f"{name}.weight" for name, module in model.named_modules() if module is head]
    if missing != names or tied_names(model):
        return ""
    return '; if it is the embedding again, write "tie_word_embeddings": true into config.json'


def _converted(
    original: Original,
    model: PreTrainedModel,
    missing: list[str],
    work: Path,
    trust_remote_code: bool,
) -> dict[str, TensorPlace]:
    """Have transformers bring the tensors into the form of this release, on disk."""
    folder = original.folder
    lacking = f"{folder} lacks {len(missing)} tensors of its model, e.g. {missing[0]}"
    try:
        factory: Any = type(model)
        loaded, report = factory.from_pretrained(
            folder,
            config=copy.deepcopy(original.config),
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
        raise SourceError(f"{lacking} ({telling_line(error)})") from error
    if mismatched := sorted(str(key) for key in report["mismatched_keys"]):
        raise SourceError(
            f"{folder} holds tensors of another shape than its config: {mismatched[0]}"
        )
    if missing := sorted(report["missing_keys"]):
        count = f"{len(missing)} tensor{'s' if len(missing) > 1 else ''}"
        raise SourceError(
            f"{folder} lacks {count} of its model, e.g. {missing[0]}{_perhaps_tied(model, missing)}"
        )
    hooks = (getattr(module, "_hf_hook", None) for module in loaded.modules())
    maps = (getattr(hook, "weights_map", None) for hook in hooks)
    index = next(found.dataset.index for found in maps if found is not None)
    return {
        name: TensorPlace(Path(entry["safetensors_file"]), entry.get("weight_name", name))
        for name, entry in index.items()
    }
