"""The list of what a checkpoint folder holds, and the check that it holds just that."""

from __future__ import annotations

import hashlib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.sources.cache import sha256_of
from claq_exp.sources.companions import PROCESSORS, TEMPLATES, TERMS
from claq_exp.system.files import read_json, write_json
from claq_exp.tensor_files.shards import TensorSpan, read_spans

MANIFEST = "manifest.json"
CARD = "README.md"  # it may change with what is measured, so no manifest lists it
CHUNK = 1 << 22  # bytes read at a time
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")  # can hold code
DESCRIPTIONS = ("config.json", "tokenizer_config.json", *PROCESSORS)  # where auto_map can stand


def write_manifest(folder: Path) -> None:
    """List size and sha256 of every file but the card, and the same of every tensor.

    Of a tensor also file, dtype and shape.
    """
    files, tensors = {}, {}
    shards = read_spans(folder)
    for name in sorted(_present(folder) - {MANIFEST, CARD}):
        path = folder / name
        digest, digests = _hash(path, shards.get(name, {}))
        files[name] = {"bytes": path.stat().st_size, "sha256": digest}
        for tensor, span in shards.get(name, {}).items():
            tensors[tensor] = _facts(name, span, digests[tensor])
    write_json(folder / MANIFEST, {"files": files, "tensors": tensors}, indent=None)


def check_manifest(folder: Path) -> None:
    """Raise CheckpointError unless every listed file and tensor is there, whole and unchanged.

    Goes over the bytes once.  A tensor that was hit is named; so is a file that is not listed,
    unless it is hidden, a `*.md` or terms of use.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST} to check it by; where transformers saved it, load it with "
            "from_pretrained, which checks less"
        )
    manifest = read_json(path)
    files, tensors = manifest.get("files"), manifest.get("tensors")
    if set(manifest) != {"files", "tensors"}:
        raise CheckpointError(f"{path} must hold files and tensors, and nothing else")
    if not isinstance(files, dict) or not isinstance(tensors, dict):
        raise CheckpointError(f"{path} must map names of files and tensors to their facts")
    present = _present(folder)
    if absent := sorted(set(files) - present):
        raise CheckpointError(f"{folder} lacks the file '{absent[0]}' of its manifest")
    for name in sorted(present - set(files) - {MANIFEST}):
        if not any(fnmatchcase(name, pattern) for pattern in ("*.md", *TERMS)):
            raise CheckpointError(f"{folder / name} is not in the manifest; take it out")
    shards = read_spans(folder)
    found: dict[str, dict[str, Any]] = {}
    for name, facts in files.items():
        if name.endswith(".safetensors") and name not in shards:
            raise CheckpointError(f"{folder / name} is no part of the weights; take it out")
        found.update(_check_file(folder / name, facts, shards.get(name, {}), tensors))
    if found != tensors:
        raise CheckpointError(f"{path} lists other tensors than the weights hold")


def asking_for_code(folder: Path) -> list[str]:
    """Return the names of the descriptions of a folder that have an `auto_map`."""
    return [
        name
        for name in DESCRIPTIONS
        if (folder / name).is_file() and "auto_map" in read_json(folder / name)
    ]


def check_harmless(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse what could run code.

    Pickles always, by CheckpointError; Python files and `auto_map` unless trust_remote_code, by
    ConfigError.
    """
    for name in sorted(_present(folder)):
        if name.endswith(PICKLES):
            raise CheckpointError(f"{folder / name} can hold code; take it out")
    if trust_remote_code:
        return
    asks = [name for name in sorted(_present(folder)) if name.endswith(".py")]
    asks += asking_for_code(folder)
    if asks:
        raise ConfigError(
            f"{folder} asks to run code of its own ({asks[0]}); set model.trust_remote_code=true "
            "to allow it"
        )


def _check_file(
    path: Path, facts: Any, spans: dict[str, TensorSpan], listed: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Compare a file with what was listed; return what should be listed of its tensors."""
    if not isinstance(facts, dict) or set(facts) != {"bytes", "sha256"}:
        raise CheckpointError(f"{path.parent / MANIFEST} must give bytes and sha256 of {path.name}")
    changed = f"{path} is not the file that was written"
    if path.stat().st_size != facts["bytes"]:
        raise CheckpointError(f"{changed}: {path.stat().st_size} bytes, not {facts['bytes']}")
    digest, digests = _hash(path, spans)
    found = {name: _facts(path.name, span, digests[name]) for name, span in spans.items()}
    if digest != facts["sha256"]:
        hit = [name for name, entry in found.items() if listed.get(name) != entry]
        which = f"the tensor {hit[0]} differs" if hit else "its sha256 differs"
        raise CheckpointError(f"{changed}: {which}")
    return found


def _facts(file: str, span: TensorSpan, digest: str) -> dict[str, Any]:
    return {"file": file, "dtype": span.dtype, "shape": list(span.shape), "sha256": digest}


def _hash(path: Path, spans: dict[str, TensorSpan]) -> tuple[str, dict[str, str]]:
    """Return the sha256 of a file and of each of its tensors, which cover it to its end."""
    if not spans:
        return sha256_of(path), {}
    whole, digests = hashlib.sha256(), {}
    with path.open("rb") as file:
        whole.update(file.read(next(iter(spans.values())).start))
        for name, span in spans.items():
            own = hashlib.sha256()
            for start in range(span.start, span.end, CHUNK):
                chunk = file.read(min(CHUNK, span.end - start))
                whole.update(chunk)
                own.update(chunk)
            digests[name] = own.hexdigest()
    return whole.hexdigest(), digests


def _present(folder: Path) -> set[str]:
    """Return the names of the files of a folder and of its chat templates, without hidden ones."""
    inside = {path for pattern in ("*", *TEMPLATES) for path in folder.glob(pattern)}
    return {
        path.relative_to(folder).as_posix()
        for path in inside
        if path.is_file() and not path.name.startswith(".")
    }
