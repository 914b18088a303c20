"""Weights that PyTorch pickled (pytorch_model*.bin), turned into safetensors once."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from claq_exp.errors import SourceError, telling_line
from claq_exp.sources.companions import copy_file
from claq_exp.sources.weight_files import PICKLED_INDEX, weight_files

if TYPE_CHECKING:
    from torch import Tensor


def convert_pickled(files: Sequence[Path], target: Path) -> None:
    """Write the tensors of pickled files as safetensors, file by file, with an index for several.

    No code of a pickle is run.  Raises SourceError for a file that holds anything but tensors.
    """
    from claq_exp.system.files import save_tensors, write_json
    from claq_exp.tensor_files.shards import INDEX_FILE, WEIGHTS_FILE, shard_name

    places: dict[str, str] = {}
    size = 0
    for number, path in enumerate(files, start=1):
        tensors = _separate(_read(path))
        if twice := sorted(set(places) & set(tensors)):
            raise SourceError(f"{path} holds {twice[0]}, which an earlier file holds too")
        name = WEIGHTS_FILE if len(files) == 1 else shard_name(number, len(files))
        save_tensors(tensors, target / name)
        places |= dict.fromkeys(tensors, name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(files) > 1:
        write_json(target / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": places})


def copy_descriptions(folder: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy configuration and tokenizer, and note where the weights come from."""
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if path.is_file() and path.name != PICKLED_INDEX:
            copy_file(path, target / path.relative_to(folder))
    origin = {"pickled": [path.name for path in weight_files(folder).files]}
    (target / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Tensor]:
    import torch

    mapped = zipfile.is_zipfile(path)  # files of PyTorch before 1.6 are no archives
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise SourceError(
            f"{path} cannot be read as tensors alone: {telling_line(error)}; give weights in "
            "safetensors"
        ) from error
    if not isinstance(state, dict) or not state:
        raise SourceError(f"{path} holds {type(state).__name__}, not tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise SourceError(
                f"{path} holds something other than tensors: {name!r} is {type(value).__name__}; "
                "give a file with nothing but the model's weights"
            )
        if form := _unusual(value):
            raise SourceError(f"{path}: {name} is {form}; give the original model's weights")
    return state


def _unusual(tensor: Tensor) -> str | None:
    """Return what a tensor is that safetensors, or the model, cannot take as numbers in rows."""
    import torch

    forms = {
        "quantized already": tensor.is_quantized,
        "complex": tensor.is_complex(),
        "sparse": tensor.layout != torch.strided,
        "without content": tensor.is_meta,
    }
    return next((form for form, found in forms.items() if found), None)


def _separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor memory of its own, as safetensors wants it (tied ones share theirs)."""
    taken: set[int] = set()
    separate = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        whole = tensor.is_contiguous() and memory not in taken
        taken.add(memory)
        separate[name] = tensor if whole else tensor.clone().contiguous()
    return separate
