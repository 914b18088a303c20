"""A model folder in the Hugging Face layout: from the hub, a path, or a GGUF file."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from claq_exp.errors import ConfigError
from claq_exp.models.gguf import converted
from claq_exp.sources.cache import cached_folder, sha256_of
from claq_exp.sources.companions import CODE, TEMPLATES, TERMS, TOKENIZER
from claq_exp.sources.hub import is_hub_name, not_given
from claq_exp.sources.paths import local_path, looks_like_path
from claq_exp.sources.pickled import convert_pickled, copy_descriptions
from claq_exp.sources.weight_files import (
    ORDER,
    has_weights,
    instead_of_weights,
    only_an_adapter,
    preferred,
    read_index,
    weight_files,
)
from claq_exp.sources.wheel import SCHEME, fetch_wheel_file

DESCRIPTIONS = ("*.json", "*.txt", *TOKENIZER, "*.codes", *TEMPLATES, "*.jinja", *TERMS)
NAME_LENGTH = 100  # of a folder, which also names the recipe
NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME_LENGTH - 1}}}")


def check_name(key: str, value: str) -> None:
    """Raise ConfigError for a name that cannot be that of a folder."""
    if not NAME.fullmatch(value):
        raise ConfigError(
            f"{key} '{value}' must be up to {NAME_LENGTH} letters, digits, '.', '_' or '-', and "
            "begin with a letter or digit, for it names a folder"
        )


@dataclass
class ModelSource:
    """Where a model comes from.

    source: hub id, local folder (Hugging Face layout, safetensors or pytorch_model.bin), local
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
        return converted(fetch_wheel_file(model.source, model.sha256), model.sha256, say)
    if looks_like_path(model.source) or not is_hub_name(model.source):
        path = local_path(model.source, "model folder")
        if path.is_file():
            return converted(_gguf_file(path, model.source), model.sha256, say)
        if not (path / "config.json").is_file():
            advice = only_an_adapter(file.name for file in path.iterdir())
            raise ConfigError(
                f"model folder '{model.source}' has no config.json"
                + (f", but an adapter; {advice}" if advice else _model_near(path))
            )
        if not weights:
            if has_weights(path):  # refused before a plan is made of a model that cannot be run
                weight_files(path)
            return path
        return _in_safetensors(path, model.source)
    folder = _from_hub(model, weights)
    return _in_safetensors(folder, model.source) if weights else folder


def source_name(source: str) -> str:
    """Return a name for folders and tables: the last part of a source, in plain characters.

    Where others than ASCII had to go, or too many, a hash keeps the names of two sources apart.
    """
    last = source.rstrip("/").rpartition("/")[2]
    if last in ("", ".", "..", "~"):
        with contextlib.suppress(RuntimeError):  # no home folder
            last = Path(source).expanduser().resolve().name
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", last).lstrip("._-")
    if plain and last.isascii() and len(plain) <= NAME_LENGTH:
        return plain
    short = plain[: NAME_LENGTH // 2].strip("._-") or "model"
    return f"{short}-{hashlib.sha256(last.encode(errors='surrogateescape')).hexdigest()[:6]}"


def fingerprint(folder: Path) -> str:
    """Return a hash of the content of configuration, tokenizer and weights.

    Files of the hub's cache are named by their content already, so their links are hashed instead.
    """
    return _hashed(folder, (*description_files(folder), *weight_files(folder).files))


def tokenizer_fingerprint(folder: Path) -> str:
    """Return a hash of the content of configuration and tokenizer, with their code."""
    return _hashed(folder, description_files(folder))


def description_files(folder: Path) -> list[Path]:
    """Return the files of configuration and tokenizer, with their code."""
    return [path for pattern in (*DESCRIPTIONS, CODE) for path in folder.glob(pattern)]


def _hashed(folder: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(set(files)):
        digest.update(path.relative_to(folder).as_posix().encode())
        stored_by_hash = path.is_symlink() and path.resolve().parent.name == "blobs"
        digest.update((path.resolve().name if stored_by_hash else sha256_of(path)).encode())
    return digest.hexdigest()


def weight_bytes(folder: Path) -> int:
    """Return the size of all weight files."""
    return weight_files(folder).bytes


def _gguf_file(path: Path, source: str) -> Path:
    """Return the path of a GGUF file.  Raises ConfigError for any other file."""
    with path.open("rb") as file:
        if path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF":
            return path
    raise ConfigError(
        f"model.source '{source}' is a file and no GGUF; give the folder that holds config.json "
        "and the weights"
    )


def _model_near(folder: Path) -> str:
    """Say which folder a little below or above one has a model, if one has."""
    below = (path for depth in ("*", "*/*") for path in sorted(folder.glob(f"{depth}/config.json")))
    above = (path for path in [folder.absolute().parent / "config.json"] if path.is_file())
    near = next((path.parent for paths in (below, above) for path in paths), None)
    return "" if near is None else f"; {near} has one"


def _from_hub(model: ModelSource, weights: bool) -> Path:
    from huggingface_hub import snapshot_download  # only needed for hub models

    wanted = [*DESCRIPTIONS, CODE, *(_hub_weights(model) if weights else [])]
    try:
        return Path(snapshot_download(model.source, revision=model.revision, allow_patterns=wanted))
    except Exception as error:
        raise not_given("model", model.source, error) from error


def _hub_weights(model: ModelSource) -> list[str]:
    """Return the files of a hub model's weights, so that none are fetched in two formats."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    try:
        # a list of files would be asked for again and again while the hub is out of reach
        described = HfApi().model_info(model.source, revision=model.revision)
        names = [file.rfilename for file in described.siblings or ()]
    except Exception:  # noqa: BLE001 - what is in the cache may do; if not, the download says why
        cached = {
            name: try_to_load_from_cache(model.source, name, revision=model.revision)
            for name in ORDER
        }
        names = [name for name, place in cached.items() if isinstance(place, str)]
    name = preferred(names)
    if name is None and names:
        raise ConfigError(f"model '{model.source}' has no weights: {instead_of_weights(names)}")
    if name is None or not name.endswith(".index.json"):
        return [name] if name else []
    try:
        index = hf_hub_download(model.source, name, revision=model.revision)
    except Exception as error:
        raise not_given("model", model.source, error, name) from error
    return sorted(set(read_index(Path(index)).values()))


def _in_safetensors(folder: Path, source: str) -> Path:
    """Return the folder, or where its weights are pickled, its form in safetensors in the cache."""
    weights = weight_files(folder)
    if not weights.pickled:
        return folder
    name = source.rstrip("/").rpartition("/")[2]

    def convert(new: Path) -> None:
        convert_pickled(weights.files, new)
        copy_descriptions(folder, new, (*DESCRIPTIONS, CODE))

    return cached_folder(f"models/{name}-{fingerprint(folder)[:16]}", convert)
