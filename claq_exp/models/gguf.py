"""GGUF files as dense models: converted once, and kept in the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from claq_exp.errors import SourceError, telling_line
from claq_exp.sources.cache import cached_folder, sha256_of


def converted(gguf: Path, sha256: str | None, say: Callable[[str], None]) -> Path:
    """Return the safetensors form of a GGUF file, made once and kept in the cache.

    It is in float16, or in float32 where float16 cannot hold it, and has no tokenizer where the
    file holds none.
    """
    content = sha256_of(gguf)
    if sha256 and content != sha256:
        raise SourceError(f"{gguf} has sha256 {content}, the config asks for {sha256}")

    def convert(folder: Path) -> None:
        say(f"converting {gguf} to float16 safetensors, once; they stay in {folder.parent}")
        _convert_gguf(gguf, folder)

    return cached_folder(f"models/{gguf.stem}-{content[:16]}", convert)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from claq_exp.models.experts import fuse_experts, split_experts  # they import transformers
    from claq_exp.models.skeleton import dense_parameter_shapes, tied_names
    from claq_exp.models.stored_types import fits_float16

    named = folder / "source.gguf"  # transformers knows a GGUF file by this ending alone
    named.symlink_to(gguf.resolve())
    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(folder),
        "gguf_file": named.name,
    }
    try:
        model = AutoModelForCausalLM.from_pretrained(**place, **_gguf_options())
        tokenizer = AutoTokenizer.from_pretrained(**place) if _has_vocabulary(gguf) else None
    except Exception as error:
        reason = telling_line(error)
        raise SourceError(f"{gguf} cannot be read as a GGUF model: {reason}") from error
    named.unlink()
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    expected = dense_parameter_shapes(model.config)
    split_experts(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name in expected}
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != expected:
        raise SourceError(f"{gguf}: transformers did not give dense weights of the expected shapes")
    fuse_experts(model)
    left_out = tied_names(model)
    whole = {name: t for name, t in model.state_dict().items() if name not in left_out}
    dtype = torch.float16 if fits_float16(whole.values()) else torch.float32
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in whole.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    origin = {"gguf": gguf.name, "sha256": sha256_of(gguf)}
    (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")


def _has_vocabulary(path: Path) -> bool:
    """Tell whether a GGUF file holds a tokenizer; some hold nothing but a model."""
    import gguf

    return gguf.GGUFReader(path).get_field("tokenizer.ggml.tokens") is not None


def _gguf_options() -> dict[str, Any]:
    """Ask for dense weights, in releases of transformers that would keep them in GGUF blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
