"""Which model is meant, and a fingerprint that changes with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from claq_exp.errors import ConfigError, SourceError
from claq_exp.models.source import ModelSource, fingerprint, model_folder, weight_bytes
from claq_exp.sources.cache import published, sha256_of


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_the_fingerprint_is_that_of_the_content_not_of_the_place(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    assert fingerprint(copy) == fingerprint(model)


def test_the_fingerprint_changes_with_one_byte_of_a_weight(model):
    before = fingerprint(model)
    flip(model / "model.safetensors")
    assert fingerprint(model) != before


def test_the_fingerprint_changes_with_the_config(model):
    before = fingerprint(model)
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(
        text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    )
    assert fingerprint(model) != before


@pytest.mark.case(64)
@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model"],
)
def test_the_fingerprint_changes_with_every_file_of_a_tokenizer(name, model):
    path = model / name
    path.write_bytes(path.read_bytes() if path.is_file() else b"{}")
    before = fingerprint(model)
    path.write_bytes(path.read_bytes() + b"\n")
    assert fingerprint(model) != before


def in_shards(model: Path, names: list[str]) -> Path:
    """Have the index name copies of the model's file; what it says of the tensors is not read."""
    for name in names:
        shutil.copy(model / "model.safetensors", model / name)
    (model / "model.safetensors").unlink()
    places = {f"tensor {number}": name for number, name in enumerate(names)}
    index = {"metadata": {}, "weight_map": places}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def test_the_fingerprint_changes_with_every_shard(model):
    before = fingerprint(in_shards(model, ["model-1.safetensors", "model-2.safetensors"]))
    flip(model / "model-2.safetensors")
    assert fingerprint(model) != before


def test_files_of_the_hubs_cache_are_known_by_their_blob(model, tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        blob = blobs / sha256_of(model / name)
        shutil.copy(model / name, blob)
        (snapshot / name).symlink_to(blob)
    first = fingerprint(snapshot)
    assert fingerprint(snapshot) == first
    other = blobs / ("0" * 64)
    (blobs / sha256_of(model / "model.safetensors")).rename(other)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other)
    assert fingerprint(snapshot) != first


def test_a_symlink_into_another_folder_is_read_for_its_content(model, tmp_path):
    target = tmp_path / "weights.safetensors"
    (model / "model.safetensors").rename(target)
    (model / "model.safetensors").symlink_to(target)
    before = fingerprint(model)
    flip(target)
    assert fingerprint(model) != before


def test_weight_bytes_are_those_of_all_shards(model):
    size = (model / "model.safetensors").stat().st_size
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    in_shards(model, ["model-1.safetensors", "model-2.safetensors"])
    assert weight_bytes(model) == 2 * size


def test_a_plan_needs_no_weights_but_a_run_does(model):
    (model / "model.safetensors").unlink()
    assert model_folder(ModelSource(str(model)), weights=False) == model
    with pytest.raises(ConfigError, match=r"no weights: looked for model\.safetensors, .*json$"):
        model_folder(ModelSource(str(model)))


@pytest.mark.parametrize("source", ["./nothing", "/nothing/at/all", "~/nothing", "a/b/c"])
def test_a_path_that_is_missing_is_not_asked_of_the_hub(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(ConfigError, match="does not exist"):
        model_folder(ModelSource(source))


class Hub:
    """Stands for the hub: answers with a folder, and notes what was asked of it."""

    def __init__(self, monkeypatch, folder: Path, names: list[str] | Exception) -> None:
        self.folder, self.names = folder, names
        self.asked: dict[str, object] = {}
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", self.describe)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.fetch)

    def download(self, name, revision, allow_patterns):
        self.asked |= {"name": name, "revision": revision, "patterns": allow_patterns}
        return str(self.folder)

    def fetch(self, name, file, revision):
        shards = SHARDS if file.startswith("pytorch") else ["a-1.safetensors", "a-2.safetensors"]
        path = self.folder.parent / "index.json"
        places = {"x": shards[0], "y": shards[1], "z": shards[0]}
        path.write_text(json.dumps({"weight_map": places}))
        return str(path)

    def describe(self, name, revision):
        if isinstance(self.names, Exception):
            raise self.names
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names])


def test_a_model_that_the_hub_does_not_give_is_one_line(monkeypatch, tmp_path):
    def fail(*args, **options):
        raise OSError("404 Client Error\nRepository Not Found")

    Hub(monkeypatch, tmp_path, OSError("no network"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(SourceError, match=r"model 'owner/nothing' .*404.*model\.source") as caught:
        model_folder(ModelSource("owner/nothing"))
    assert "\n" not in str(caught.value)


def test_a_plan_asks_the_hub_for_no_weights(model, monkeypatch):
    hub = Hub(monkeypatch, model, AssertionError("listed"))
    assert model_folder(ModelSource("owner/name", revision="v1"), weights=False) == model
    assert (hub.asked["name"], hub.asked["revision"]) == ("owner/name", "v1")
    assert not [p for p in hub.asked["patterns"] if "safetensors" in p or "bin" in p]


SHARDS = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model.safetensors", "model.safetensors.index.json"], ["model.safetensors"]),
        (
            ["model.safetensors.index.json", "consolidated.safetensors"],
            ["a-1.safetensors", "a-2.safetensors"],
        ),
        (["pytorch_model.bin", "adapter_model.safetensors"], ["pytorch_model.bin"]),
        (["pytorch_model.bin.index.json", *SHARDS], SHARDS),
        (OSError("no network, and perhaps all of it in the cache"), []),
    ],
    ids=str,
)
def test_weights_are_fetched_in_one_format(names, wanted, model, monkeypatch):
    hub = Hub(monkeypatch, model, names)
    assert model_folder(ModelSource("owner/name")) == model
    assert [p for p in hub.asked["patterns"] if "safetensors" in p or "bin" in p] == wanted


@pytest.mark.case(114)
def test_a_hub_model_without_weights_is_refused_before_anything_is_fetched(model, monkeypatch):
    hub = Hub(monkeypatch, model, ["adapter_config.json", "adapter_model.safetensors"])
    with pytest.raises(ConfigError, match=r"found adapter_model\.safetensors; merge the adapter"):
        model_folder(ModelSource("owner/name"))
    assert not hub.asked


def test_a_gguf_file_that_is_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no model")
    with pytest.raises(SourceError, match=r"model\.gguf cannot be read as a GGUF model") as caught:
        model_folder(ModelSource(str(path)))
    assert "\n" not in str(caught.value)
    assert not [found for found in (tmp_path / "cache").rglob("*") if found.is_file()]
    with pytest.raises(SourceError, match="the config asks for 0000"):
        model_folder(ModelSource(str(path), sha256="0" * 64))


def test_a_published_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "cache" / "thing"
    with pytest.raises(RuntimeError), published(target) as folder:
        (folder / "half").write_text("half")
        assert not target.exists()
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with published(target) as folder:
        (folder / "whole").write_text("first")
    with pytest.raises(FileExistsError), published(target) as folder:
        (folder / "whole").write_text("second")
    assert (target / "whole").read_text() == "first"
    assert list(target.parent.iterdir()) == [target]
