"""What a person must know of the stored tensors of a model, from what results.json says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def source_notes(found: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each thing that `Original.as_dict` (`models/original.py`) tells."""
    notes = []
    if untied := found.get("untied"):
        notes.append(
            f"{untied[0]} is stored unlike the tensor that config.json ties it to; the model is "
            "untied, as transformers loads it, and so is the checkpoint"
        )
    return notes + source_losses(found)


def source_losses(found: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each thing that another model than the stored one comes from."""
    losses = []
    if unused := found.get("unused_tensors"):
        tensors = f"{unused:,} stored tensor{'s have' if unused > 1 else ' has'}"
        losses.append(
            f"{tensors} no place in the model of config.json and {'are' if unused > 1 else 'is'} "
            f"left out, e.g. {found['unused_examples'][0]}; mend config.json, or take them out"
        )
    if adapter := found.get("adapter"):
        losses.append(
            f"{adapter} lies beside the model, and its adapter is not applied; merge it into the "
            "model, or take its files out"
        )
    if small := found.get("too_small"):
        tensors = f"{small:,} tensor{'s hold' if small > 1 else ' holds'}"
        losses.append(
            f"{tensors} numbers that are too small for float16, and lose more than rounding, e.g. "
            f"{found['too_small_examples'][0]}; rescale the weights, or where they are kept as "
            'they are, write "dtype": "float32" into config.json'
        )
    return losses
