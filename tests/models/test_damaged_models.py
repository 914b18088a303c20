"""A damaged model folder is opened or refused in one line, before anything is quantized."""

from __future__ import annotations

import json
import shutil

import damaged_models
import pytest
from conftest import byte_tokenizer, tiny_llama
from damages import started

from claq_exp.errors import SourceError
from claq_exp.models.load import open_model

ROUNDS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, options in (("whole", {}), ("shards", {"max_shard_size": "20KB"})):
        tiny_llama(num_hidden_layers=2).save_pretrained(folder / name, **options)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def cases(models, text_file, tmp_path_factory) -> list[dict]:
    work = tmp_path_factory.mktemp("work")
    return started(damaged_models.__file__, models, work, text_file, ROUNDS)


@pytest.mark.case(57)
@pytest.mark.parametrize("model", ["whole", "shards"])
def test_a_damaged_model_is_opened_or_refused_in_one_line(model, cases):
    own = [case for case in cases if case["model"] == model]
    assert len(own) == 11 * ROUNDS
    assert [case for case in own if case["outcome"] not in ("opened", "refused")] == []
    assert sum(case["outcome"] == "refused" for case in own) > 0.3 * len(own)


@pytest.mark.case(57)
@pytest.mark.parametrize("damage", ["shard missing", "index twice", "no map"])
def test_a_model_whose_shards_do_not_fit_its_index_is_refused(damage, models, tmp_path):
    folder = shutil.copytree(models / "shards", tmp_path / "model")
    if damage == "shard missing":
        next(folder.glob("model-*.safetensors")).unlink()
    elif damage == "index twice":
        path = folder / "model.safetensors.index.json"
        name = '"model.norm.weight": '
        path.write_text(path.read_text().replace(name, name + '"x.safetensors", ' + name, 1))
    else:
        (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(SourceError, match=str(folder)) as caught:
        open_model(folder, tmp_path, dtype="float32", device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.case(73)
@pytest.mark.parametrize(
    "size",
    ["num_hidden_layers", "hidden_size", "vocab_size", "head_dim", "max_position_embeddings"],
)
def test_sizes_that_no_model_has_are_refused_before_they_take_memory(size, models, tmp_path):
    folder = shutil.copytree(models / "whole", tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {size: 2**40}))
    with pytest.raises(SourceError, match=size):
        open_model(folder, tmp_path, dtype="float32", device="cpu")
