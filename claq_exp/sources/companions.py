"""Files that belong to a model beside its config and weights, and go where the model goes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.spm", "*.tiktoken", "tekken.json"),
)
PROCESSORS = (  # of images, video and sound
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "audio_tokenizer_config.json",
)
TEMPLATES = ("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja")
GENERATION = "generation_config.json"
TERMS = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")  # go with every copy
CODE = "*.py"
NEVER = (  # endings of weights and of what can hold code: no companion, whatever its name
    *(".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".gguf", ".h5"),
    *(".msgpack", ".onnx", ".npz", ".py", ".index.json"),
)


@dataclass(frozen=True)
class Companions:
    """The companions of the model in `folder`.  vocabulary: files that its tokenizer's class names.

    Its weights, adapters, states of training, results and model card are none: a checkpoint is
    another model.
    """

    folder: Path
    vocabulary: tuple[str, ...] = ()

    def tokenizer(self) -> list[Path]:
        """Return the tokenizer's files, relative to the folder."""
        names = (name for name in self.vocabulary if not set(name) & set("*?[/"))
        return self._found((*TOKENIZER, *names))

    def others(self) -> list[Path]:
        """Return settings of processors and of generation, chat templates and licence texts."""
        return self._found((*PROCESSORS, *TEMPLATES, GENERATION, *TERMS))

    def code(self) -> list[Path]:
        """Return the model's own code."""
        return self._found((CODE,), never=())

    def copy(self, names: Iterable[Path], target: Path) -> None:
        """Copy files into another folder, byte by byte."""
        for name in names:
            copy_file(self.folder / name, target / name)

    def _found(self, patterns: Iterable[str], never: tuple[str, ...] = NEVER) -> list[Path]:
        found = {path for pattern in patterns for path in self.folder.glob(pattern)}
        return sorted(
            path.relative_to(self.folder)
            for path in found
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(never)
        )


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content; links are followed, and missing folders made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
