"""Quantizes a model in memory, and keeps what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from claq_exp.checkpoint.store import BlockStore
from claq_exp.checkpoint.writer import PackedWeight
from claq_exp.models.stream import WholeModel
from claq_exp.quantize.recipe import Recipe
from claq_exp.run.quantize import quantize_model


@dataclass(frozen=True)
class Quantized:
    """Every quantized linear by its name in the model, and a report row for each."""

    packed: dict[str, PackedWeight]
    report: list[dict[str, Any]]


def opened(folder: Path, run: str = "run") -> BlockStore:
    store = BlockStore(folder, {"run": run})
    store.open()
    return store


def quantized_model(
    model: PreTrainedModel, batches: list[Tensor], recipe: Recipe, folder: Path, **options: Any
) -> Quantized:
    store = opened(folder)
    quantize_model(WholeModel(model), batches, recipe, store, **options)
    return Quantized(store.packed(), store.report("quantize"))
