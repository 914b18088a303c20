"""A checkpoint from a stranger: nothing in it leads outside, runs, or takes the memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damages import limits
from packed_models import SOME_LINEAR, Written, change_json
from safetensors.torch import load_file, save_file

from claq_exp.checkpoint.manifest import write_manifest
from claq_exp.errors import CheckpointError, ClaqError, ConfigError
from claq_exp.runtime.load import load_checkpoint

INDEX = "model.safetensors.index.json"
both_loaders = pytest.mark.parametrize("kernel", ["dense", "reference"])


@pytest.fixture(scope="module")
def originals(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    written = Written(tiny_model)
    written.write(folder / "whole")
    written.write(folder / "shards", shard_bytes=40_000)
    return folder


@pytest.fixture
def checkpoint(originals, tmp_path) -> Callable[[str], Path]:
    """Make a copy, in a folder of its own, that a test may damage."""
    return lambda name: Path(shutil.copytree(originals / name, tmp_path / "inside" / name))


def covered_up(folder: Path) -> None:
    """Write a manifest that agrees with a damage, where that can be done."""
    try:
        write_manifest(folder)
    except ClaqError:
        return


# Paths that lead outside


def shard_outside(folder: Path, name: str) -> None:
    """Move a shard to where the index now says."""
    index = json.loads((folder / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    shutil.move(folder / first, folder / name)
    places = {key: name if file == first else file for key, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": places}))


@pytest.mark.case(57)
@both_loaders
@pytest.mark.parametrize("manifest", ["agrees", "as written"])
@pytest.mark.parametrize("where", ["above", "absolute", "below"])
def test_an_index_cannot_name_a_file_outside_of_the_folder(
    where, manifest, kernel, checkpoint, tmp_path
):
    folder = checkpoint("shards")
    (folder / "sub").mkdir()
    name = {
        "above": "../model-00001-of-00002.safetensors",
        "absolute": str(tmp_path / "model-00001-of-00002.safetensors"),
        "below": "sub/model-00001-of-00002.safetensors",
    }[where]
    shard_outside(folder, name)
    if manifest == "agrees":
        covered_up(folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, kernel=kernel)
    assert str(folder) in str(caught.value)


@pytest.mark.case(68)
@both_loaders
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/secret", ".", ""])
def test_a_manifest_cannot_name_a_file_outside_of_the_folder(name, kernel, checkpoint):
    folder = checkpoint("whole")
    (folder.parent / "secret").write_text("x")
    (folder / "sub").mkdir()
    (folder / "sub" / "secret").write_text("x")
    change_json(
        folder / "manifest.json",
        lambda data: data["files"].update({name: {"bytes": 1, "sha256": ""}}),
    )
    with pytest.raises(CheckpointError, match="lacks the file"):
        load_checkpoint(folder, kernel=kernel)


@pytest.mark.case(68)
@both_loaders
def test_a_link_counts_by_what_it_leads_to(kernel, checkpoint, originals, tmp_path):
    folder = checkpoint("whole")
    target = shutil.move(folder / "model.safetensors", tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(target)  # as in the hub's cache
    load_checkpoint(folder, kernel=kernel)
    with Path(target).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(CheckpointError, match="is not the file that was written"):
        load_checkpoint(folder, kernel=kernel)
    Path(target).unlink()
    with pytest.raises(CheckpointError, match="lacks the file"):
        load_checkpoint(folder, kernel=kernel)


# Code


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def plant(folder: Path, mark: Path) -> None:
    """Put code wherever a loader might look for it."""
    code = f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n"
    for name in ("evil.py", "__init__.py", "modeling_llama.py", "tokenization_evil.py"):
        (folder / name).write_text(code)
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    change_json(folder / "config.json", lambda data: data.update(auto_map=auto_map))


@pytest.mark.case(56)
@both_loaders
@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_planted_code_is_refused_and_not_run(model_type, kernel, checkpoint, tmp_path, monkeypatch):
    folder, mark = checkpoint("whole"), tmp_path / "ran"
    plant(folder, mark)
    change_json(folder / "config.json", lambda data: data.update(model_type=model_type))
    write_manifest(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_checkpoint(folder, kernel=kernel)
    assert not mark.exists()
    assert "evil" not in sys.modules


@pytest.mark.case(56)
@both_loaders
@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "a.pkl", "b.pt"])
def test_a_planted_pickle_is_refused_and_not_opened(name, trust, kernel, checkpoint, tmp_path):
    folder, mark = checkpoint("whole"), tmp_path / "ran"
    torch.save(Bomb(mark), folder / name)
    write_manifest(folder)
    with pytest.raises(CheckpointError, match="can hold code"):
        load_checkpoint(folder, kernel=kernel, trust_remote_code=trust)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # what would have happened


# Sizes


def huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    entry = {"dtype": "F16", "shape": [2**20, 2**20], "data_offsets": [0, 2**41]}
    header = json.dumps({"model.norm.weight": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))


def config_of(**changes: object) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", lambda data: data.update(changes))


def layout_of(**changes: object) -> Callable[[Path], None]:
    return lambda folder: change_json(
        folder / "config.json",
        lambda data: data["quantization_config"]["modules"][SOME_LINEAR].update(changes),
    )


def huge_empty_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.galaxy": torch.empty(2**40, 0)}, path)


HUGE = {
    "header": huge_header,
    "empty tensor of many rows": huge_empty_tensor,
    "rows": layout_of(rows=2**40),
    "columns": layout_of(columns=2**40, columns_per_width={"2": 2**40}),
    "reserved entries": layout_of(reserved=2**40, most_reserved=2**40),
    "vocabulary": config_of(vocab_size=2**40),
    "hidden size": config_of(hidden_size=2**40),
    "intermediate size": config_of(intermediate_size=2**40),
    "blocks": config_of(num_hidden_layers=2**40),
    "heads": config_of(num_attention_heads=2**40, num_key_value_heads=2**40),
    "head size": config_of(head_dim=2**40),
}


@pytest.mark.case(73)
@both_loaders
@pytest.mark.parametrize("what", HUGE)
def test_huge_sizes_are_refused_before_memory_is_taken(what, kernel, checkpoint):
    folder = checkpoint("whole")
    HUGE[what](folder)
    covered_up(folder)
    with limits(), pytest.raises(CheckpointError):
        load_checkpoint(folder, kernel=kernel)
