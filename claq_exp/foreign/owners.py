"""Which part of a model a stored tensor belongs to: its structure on the meta device says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from claq_exp.errors import CheckpointError, telling_line
from claq_exp.foreign.found import Foreign
from claq_exp.foreign.headers import open_gguf
from claq_exp.models.discover import find_blocks, linear_weight, linears_of
from claq_exp.models.load import load_config
from claq_exp.models.skeleton import skeleton, tied_names
from claq_exp.models.towers import text_config
from claq_exp.models.weights import renaming

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EMBEDDING, HEAD = "embedding", "head"
EXPERT = re.compile(r"\bexperts\.\d+\.")
MIXTRAL = re.compile(r"(\bexperts\.\d+\.)(w[123])\b")  # whose experts transformers joins
MIXTRAL_LAYERS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass
class Owners:
    """The parts of a model, by the names that a file gives them.

    linears: layers of decoder blocks -> (rows, columns); of experts that are stored in one tensor
    the rows of all.  ends: embedding and head -> account.  others: what else has parameters.
    parameters: of the model, tied ones once.  prefix: of the model without its head.
    renamed: what transformers calls a tensor that has an older name.
    """

    parameters: int
    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    prefix: str = ""
    renamed: Callable[[str], str] = str

    def owner(self, tensor: str) -> tuple[str, str]:
        """Return the part that a stored tensor belongs to and the rest of its name.

        The part is empty where none fits.
        """
        for name in self._called(tensor):
            parts = name.split(".")
            for end in range(len(parts) - 1, 0, -1):
                part = ".".join(parts[:end])
                if part in self.linears or part in self.ends or part in self.others:
                    return part, ".".join(parts[end:])
            if name in self.others:  # a parameter beside modules
                return name, ""
        return "", tensor

    def _called(self, tensor: str) -> Iterator[str]:
        """Yield what a tensor may be called in the model: older names, another first part."""
        yield tensor
        renamed = self.renamed(tensor)
        yield MIXTRAL.sub(lambda found: f"{found[1]}{MIXTRAL_LAYERS[found[2]]}", renamed)
        if self.prefix:
            yield f"{self.prefix}.{tensor}"
            yield tensor.removeprefix(f"{self.prefix}.")


def model_config(foreign: Foreign, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the config of a checkpoint's model, without its quantization.

    Raises ConfigError or SourceError where transformers makes none.
    """
    if foreign.is_gguf:
        return _gguf_config(foreign.path)
    config = load_config(foreign.path, trust_remote_code=trust_remote_code)
    for part in (config, text_config(config)):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config


def find_owners(foreign: Foreign, config: PretrainedConfig) -> Owners:
    """Return the parts of a checkpoint's model by the names of its files."""
    model = skeleton(config)
    found = _of_model(model)
    return _as_gguf(found, foreign.path) if foreign.is_gguf else found


def _of_model(model: PreTrainedModel) -> Owners:
    tied = tied_names(model)
    state = model.state_dict()
    owners = Owners(sum(t.numel() for n, t in state.items() if n not in tied))
    owners.prefix = model.base_model_prefix
    owners.renamed = renaming(model)
    path, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        for name, module in linears_of(block).items():
            rows, columns = linear_weight(module).shape
            owners.linears[f"{path}.{index}.{name}"] = (rows, columns)
    ends = {model.get_input_embeddings(): EMBEDDING, model.get_output_embeddings(): HEAD}
    for name, module in model.named_modules():
        if module in ends and module is not None:
            owners.ends.setdefault(name, ends[module])
    names = {name.rpartition(".")[0] or name for name in state}
    names |= {name for name, _ in model.named_buffers()}
    owners.others = names - owners.linears.keys() - owners.ends.keys()
    return owners


def _as_gguf(owners: Owners, path: Path) -> Owners:
    """Call all parts as llama.cpp does, by the map of its own package."""
    import gguf

    architecture = _text(open_gguf(path), "general.architecture")
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise CheckpointError(f"{path}: gguf knows no architecture '{architecture}'")
    numbers = [int(n) for name in owners.linears for n in re.findall(r"\.(\d+)\.", name)]
    names = gguf.get_tensor_name_map(known[architecture], 1 + max(numbers, default=0))

    def called(name: str) -> str:
        return names.get_name(EXPERT.sub("experts.", name)) or ""

    renamed = Owners(owners.parameters)
    for name, (rows, columns) in owners.linears.items():
        part = called(name)
        if part:
            before = renamed.linears.get(part, (0, columns))[0]
            renamed.linears[part] = (before + rows, columns)
    renamed.ends = {called(name): account for name, account in owners.ends.items() if called(name)}
    others = {called(name) for name in owners.others} | {"rope_freqs"}
    renamed.others = others - {""} - renamed.linears.keys() - renamed.ends.keys()
    return renamed


def _text(reader: Any, key: str) -> str:
    found = reader.get_field(key)
    return "" if found is None else str(found.contents())


def _gguf_config(path: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    with TemporaryDirectory() as folder:
        named = Path(folder) / "source.gguf"  # transformers knows a GGUF file by this ending alone
        named.symlink_to(path.resolve())
        try:
            config = AutoConfig.from_pretrained(folder, gguf_file=named.name)
        except Exception as error:  # another's code, another's file
            reason = telling_line(error)
            raise CheckpointError(
                f"{path} cannot be read as a GGUF model, and may be cut short: {reason}"
            ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
