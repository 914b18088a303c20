"""Which files of a model folder are its weights, by the rule of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from claq_exp.errors import CheckpointError, ConfigError, SourceError
from claq_exp.system.files import read_json
from claq_exp.tensor_files.shards import INDEX_FILE, WEIGHTS_FILE

PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
ORDER = (WEIGHTS_FILE, INDEX_FILE, PICKLED, PICKLED_INDEX)  # of transformers: the first is taken
NAMED = "transformers_weights"  # key of config.json that names another file than these
ADAPTER_CONFIG = "adapter_config.json"

# Weights that transformers does not take for a model's: what their names look like, and a way out.
OTHERS = {
    r"adapter_model\b.*": "merge the adapter into its base model first (merge_and_unload of peft)",
    r".+\.gguf": "give the .gguf file itself as model.source",
    r"consolidated\b.*": "give the model in the form of transformers, not in Mistral's or Meta's",
    r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)": "fetch the index of these shards too",
    r"(model|pytorch_model)\.[^.]+\.(safetensors|bin)"
    r"|(model\.safetensors|pytorch_model\.bin)\.index\.[^.]+\.json": (
        "it is a variant: give it the name without the variant"
    ),
    r"tf_model.*\.h5|flax_model.*\.msgpack|model\.ckpt.*": (
        "store it anew with save_pretrained of a transformers that reads it (before 5)"
    ),
    r"(?!training_args|optimizer|scheduler|scaler|rng_state)"
    r".+\.(safetensors|bin|pt|pth|ckpt|onnx|h5|msgpack)": (
        f"transformers would not find it: name it {WEIGHTS_FILE} if it is the model"
    ),
}


@dataclass(frozen=True)
class WeightFiles:
    """The files with the weights of a model.

    files: in the order of their names.  places: tensor -> name of its file, where an index says it.
    """

    files: tuple[Path, ...]
    places: Mapping[str, str] | None = None

    @property
    def pickled(self) -> bool:
        """Tell whether PyTorch pickled them."""
        return any(path.suffix == ".bin" for path in self.files)

    @property
    def bytes(self) -> int:
        """What they take."""
        return sum(path.stat().st_size for path in self.files)


def weight_files(folder: Path) -> WeightFiles:
    """Find the weights of a Hugging Face folder as transformers does.

    Raises ConfigError where there are none, with what there is instead, SourceError for an index
    that names what is not there.
    """
    name = preferred(_files(folder), _named(folder))
    if name is None:
        raise ConfigError(
            f"model folder '{folder}' has no weights: {instead_of_weights(_files(folder))}"
        )
    if not (folder / name).is_file():
        raise SourceError(f"{folder / name} leads nowhere; fetch the model again")
    if not name.endswith(".index.json"):
        return WeightFiles((folder / name,))
    places = read_index(folder / name)
    shards = sorted(set(places.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise SourceError(
            f"{folder / name} names {missing[0]}, which is not there; fetch the model again"
        )
    return WeightFiles(tuple(folder / shard for shard in shards), places)


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds weights of any kind; else it describes a model alone."""
    names = _files(folder)
    return preferred(names) is not None or bool(_others(names))


def preferred(names: Iterable[str], named: str | None = None) -> str | None:
    """Return which of a folder's files holds the weights, or is their index.

    named: by config.json.
    """
    there = set(names)
    return next((name for name in (named, *ORDER) if name in there), None)


def read_index(path: Path) -> dict[str, str]:
    """Return tensor -> file from an index.  Raises SourceError for one that leads elsewhere."""
    try:
        places = read_json(path).get("weight_map")
    except CheckpointError as error:
        raise SourceError(str(error)) from error
    if not isinstance(places, dict) or not places:
        raise SourceError(f"{path} names no files of weights: it has no weight_map")
    for file in places.values():
        name = PurePosixPath(file) if isinstance(file, str) else PurePosixPath("/")
        if name.is_absolute() or ".." in name.parts:
            raise SourceError(f"{path} names {file!r}, which is no file of its folder")
    return places


def adapter_beside(folder: Path) -> str | None:
    """Return the name of an adapter that peft would put onto the model of a folder, if any."""
    return ADAPTER_CONFIG if (folder / ADAPTER_CONFIG).is_file() else None


def instead_of_weights(names: Iterable[str]) -> str:
    """Return what was looked for among files and what was found, with a way out."""
    found = _others(names)
    looked_for = f"looked for {', '.join(ORDER)}"
    if not found:
        return looked_for
    listed = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    return f"{looked_for}, and found {listed}; {_advice(found[0])}"


def only_an_adapter(names: Iterable[str]) -> str | None:
    """Return what to do where files are those of an adapter, and None elsewhere."""
    found = _others(names)
    return _advice(found[0]) if found and found[0].startswith("adapter_model") else None


def _named(folder: Path) -> str | None:
    """Return the file that config.json itself names, which comes first."""
    try:
        named = read_json(folder / "config.json").get(NAMED)
    except CheckpointError:  # whoever reads the config says what is wrong with it
        return None
    forms = (".safetensors", ".safetensors.index.json")
    fits = isinstance(named, str) and named.endswith(forms) and Path(named).name == named
    if named is not None and not (fits and (folder / str(named)).is_file()):
        raise SourceError(f"{folder / 'config.json'}: {NAMED} is {named!r}, which is not there")
    return named


def _files(folder: Path) -> list[str]:
    """Return the files of a folder and of `original/`, where Meta's form lies."""
    paths = [*folder.iterdir(), *folder.glob("original/*")]
    return sorted(path.relative_to(folder).as_posix() for path in paths if not path.is_dir())


def _others(names: Iterable[str]) -> list[str]:
    """Return the weights that are not the model's, those first that are most likely meant."""
    found = [name for name in names if name not in ORDER and _form(name) is not None]
    return sorted(found, key=lambda name: (list(OTHERS).index(str(_form(name))), name))


def _form(name: str) -> str | None:
    last = name.rpartition("/")[2]
    return next((form for form in OTHERS if re.fullmatch(form, last)), None)


def _advice(name: str) -> str:
    return OTHERS[str(_form(name))]
