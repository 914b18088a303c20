"""Which checkpoint of another owner a path is, and which package loads it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from claq_exp.checkpoint.writer import QUANT_METHOD
from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.models.source import description_files
from claq_exp.run_folder import CHECKPOINT, run_state
from claq_exp.sources.cache import sha256_of
from claq_exp.sources.weight_files import weight_files
from claq_exp.system.files import read_json

DENSE, GGUF, HQQ, COMPRESSED = "dense", "gguf", "hqq", "compressed-tensors"
HQQ_WEIGHTS = "qmodel.pt"  # what save_quantized of hqq writes, beside a config.json without a word
MAGIC = b"GGUF"


@dataclass(frozen=True)
class Package:
    """What loads a format: distributions as pip knows them, the first is the owner's.

    modules: that must be there.
    """

    distributions: tuple[str, ...]
    modules: tuple[str, ...]


def _one(distribution: str, module: str | None = None) -> Package:
    return Package((distribution,), (module or distribution,))


PACKAGES = {
    "gptq": Package(("gptqmodel", "optimum"), ("gptqmodel", "optimum")),
    "awq": _one("gptqmodel"),
    "auto-round": _one("auto-round", "auto_round"),
    COMPRESSED: _one("compressed-tensors", "compressed_tensors"),
    HQQ: _one("hqq"),
    "bitsandbytes": _one("bitsandbytes"),
    "torchao": _one("torchao"),
    "aqlm": _one("aqlm"),
    "vptq": _one("vptq"),
    "quanto": _one("optimum-quanto", "optimum.quanto"),
    "eetq": _one("eetq"),
    "spqr": _one("spqr-quant", "spqr_quant"),
    "higgs": _one("flute-kernel", "flute"),
    "fp_quant": _one("fp-quant", "fp_quant"),
    "quark": _one("amd-quark", "quark"),
    "sinq": _one("sinq"),
    GGUF: _one("gguf"),
}


@dataclass(frozen=True)
class Foreign:
    """A checkpoint that is not of this project.

    path: a Hugging Face folder, or a GGUF file.  method: its `quant_method`, `gguf`, or `dense` for
    weights that are not quantized.  quantization: its quantization_config, empty where it has none.
    """

    path: Path
    method: str
    quantization: dict[str, Any] = field(default_factory=dict)

    @property
    def is_gguf(self) -> bool:
        """Tell whether it is a file of llama.cpp."""
        return self.method == GGUF

    @property
    def is_pickled_hqq(self) -> bool:
        """Tell whether hqq itself wrote the weights, in a file that only hqq reads."""
        return self.method == HQQ and (self.path / HQQ_WEIGHTS).is_file()

    def has_packed_zeros(self) -> bool:
        """Tell whether it is an asymmetric grid of compressed-tensors on weights alone.

        transformers 5.24 reads their zero points only when it dequantizes at load, which would
        also drop the rounding of activations.
        """
        groups = self.quantization.get("config_groups")
        if self.method != COMPRESSED or not isinstance(groups, dict):
            return False
        parts = [group for group in groups.values() if isinstance(group, dict)]
        rounds = any(part.get("input_activations") for part in parts)
        grids = [part.get("weights") for part in parts]
        packed = any(isinstance(grid, dict) and grid.get("symmetric") is False for grid in grids)
        return packed and not rounds

    def weight_files(self) -> tuple[Path, ...]:
        """Return the files of its weights.  Raises ConfigError where there are none."""
        if self.is_gguf:
            return (self.path,)
        if self.is_pickled_hqq:
            return (self.path / HQQ_WEIGHTS,)
        return weight_files(self.path).files

    def content(self) -> str:
        """Return a hash of its files: weights, configuration, tokenizer."""
        files = set(self.weight_files())
        if not self.is_gguf:
            files |= set(description_files(self.path))
        digest = hashlib.sha256()
        for path in sorted(files):
            digest.update(f"{path.name}:{sha256_of(path)}\n".encode())
        return digest.hexdigest()

    def about(self) -> dict[str, Any]:
        """Return what results.json says of it.

        package, version: what loads it here.  written_by: what the checkpoint says of its writer.
        """
        package = PACKAGES[self.method].distributions[0] if self.method in PACKAGES else None
        return {
            "quant_method": self.method,
            "package": package or "transformers",
            "version": _version(package or "transformers"),
            "written_by": _written_by(self.quantization),
            "group_size": _group_size(self.quantization),
        }


def find_foreign(named: str | Path) -> Foreign | None:
    """Return the checkpoint of another owner that a person names; None for what is none.

    Folders of this project's runs and checkpoints, and paths where nothing is, are none of them.
    Raises ConfigError for a file that is no GGUF.
    """
    path = Path(named).expanduser()
    if path.is_file():
        return _gguf(path)
    described = path / "config.json"
    if (path / CHECKPOINT / "config.json").is_file() or not described.is_file():
        return None
    if run_state(path) is not None:
        return None
    try:
        config = read_json(described)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    quantization = _quantization(config)
    method = _method(quantization)
    if method == QUANT_METHOD:
        return None
    if method is None and (path / HQQ_WEIGHTS).is_file():
        method = HQQ
    return Foreign(path, method or DENSE, quantization)


def check_package(foreign: Foreign) -> None:
    """Raise ConfigError, with pip's command, where the package that loads it is missing."""
    package = PACKAGES.get(foreign.method)
    if package is None or all(map(_is_there, package.modules)):
        return
    raise ConfigError(
        f"{foreign.path} is quantized by {foreign.method}, and the package that loads it is not "
        f"installed: pip install {' '.join(package.distributions)}"
    )


def _gguf(path: Path) -> Foreign:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            return Foreign(path, GGUF)
    raise ConfigError(
        f"checkpoint '{path}' is a file and no GGUF; name the folder with its config.json"
    )


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    """Return the quantization_config of a model, or of its text tower."""
    parts = (config, config.get("text_config"))
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            found = part.get(key) if isinstance(part, dict) else None
            if isinstance(found, dict) and found:
                return found
    return {}


def _method(quantization: dict[str, Any]) -> str | None:
    """Return the owner's name of a format, as transformers calls it."""
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if isinstance(method, str):
        return method
    early = any(quantization.get(f"load_in_{bits}bit") for bits in (4, 8))
    return "bitsandbytes" if early else "unknown"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _written_by(quantization: dict[str, Any]) -> str:
    """Return package and version that a quantization_config names, or an empty word."""
    meta = quantization.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    if isinstance(quantizer, list) and quantizer:
        quantizer = quantizer[0]
    if isinstance(quantizer, str):
        return quantizer.replace(":", " ")
    if version := quantization.get("autoround_version"):
        return f"auto-round {version}"
    version = quantization.get("version")
    if isinstance(version, str) and re.match(r"\d", version):
        return f"{quantization.get('quant_method')} {version}"
    provider = quantization.get("provider")
    return provider if isinstance(provider, str) else ""


def _group_size(quantization: dict[str, Any]) -> int | None:
    """Return how many weights share a scale, where the quantization_config says one number."""
    groups = quantization.get("config_groups")
    parts: list[Any] = [quantization]
    if isinstance(groups, dict):
        parts += [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    sizes = {part.get("group_size") for part in parts if isinstance(part, dict)}
    found = [size for size in sizes if isinstance(size, int) and size > 0]
    return found[0] if len(found) == 1 else None
