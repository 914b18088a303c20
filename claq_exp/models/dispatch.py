"""Models that are larger than one device, spread over several by accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from claq_exp.models.stream import StreamedModel
from claq_exp.system.resources import available_memory

DISK, CPU = "disk", "cpu"


def loaded(
    model: StreamedModel, device_map: str | None, memory: Mapping[int | str, Any] | None = None
) -> PreTrainedModel:
    """Bring a model into memory: onto its device, or spread over all that there are.

    device_map: auto, balanced or sequential, as of transformers.  What fits into no GPU stays in
    the main memory, and what does not fit there on disk: it is read from the model's own files each
    time it is needed.  memory: device -> bytes that may be taken; all that is free by default.
    """
    if device_map is None:
        return model.load()
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    whole = model.model
    whole.tie_weights()
    together = [type(block).__name__ for block in model.blocks]  # a block is on one device
    limits = get_max_memory(dict(memory) if memory else None)
    limits[CPU] = min(limits.get(CPU, 0), available_memory())
    if device_map != "sequential":
        limits = get_balanced_memory(whole, limits, together)
    places = infer_auto_device_map(whole, limits, together)
    main = next((place for place in places.values() if place not in (CPU, DISK)), CPU)
    away = {CPU, DISK} - {main}  # brought to the main device when they are needed

    def device(name: str) -> Any:
        place = _place(name, places)
        return None if place in away else place

    model.load(device)
    elsewhere = _Elsewhere(model, lambda name: _place(name, places), away)
    return dispatch_model(whole, places, main, elsewhere, offload_index={})


def input_device(model: PreTrainedModel) -> torch.device:
    """Return where a model takes its token ids, which is no device where its table is on disk."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


class _Elsewhere(Mapping[str, Tensor]):
    """The weights that are not on the device that computes: in memory, or read from files."""

    def __init__(self, model: StreamedModel, place: Callable[[str], Any], away: set[str]) -> None:
        self._model = model
        self._names = {
            name: parameter.dtype
            for name, parameter in model.model.state_dict().items()
            if place(name) in away
        }
        self._in_memory = {name: self._read(name) for name in self._names if place(name) == CPU}

    def _read(self, name: str) -> Tensor:
        return self._model.read(name).to(self._names[name])

    def __getitem__(self, name: str) -> Tensor:
        found = self._in_memory.get(name)
        return self._read(name) if found is None else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _place(name: str, places: Mapping[str, Any]) -> Any:
    """Return where a parameter is: the longest name of a module in front of its own says."""
    while name and name not in places:
        name = name.rpartition(".")[0]
    return places[name]
