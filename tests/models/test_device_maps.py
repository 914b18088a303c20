"""A model that is spread over devices, or lies on disk in part, computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_architectures import ARCHITECTURES, saved, streamed

from claq_exp.evaluation.perplexity import Corpus, perplexity
from claq_exp.evaluation.predict import in_memory
from claq_exp.models.dispatch import input_device, loaded
from claq_exp.models.stream import StreamedModel

TOKENS = torch.randint(200, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def size(model: StreamedModel) -> int:
    return sum(parameter.numel() * 4 for parameter in model.model.parameters())


@pytest.mark.parametrize("share", [0.6, 0.0])
def test_what_does_not_fit_is_read_from_disk_and_computes_the_same(folder, tmp_path, share):
    whole = streamed(folder, tmp_path).load()
    model = streamed(folder, tmp_path)
    spread = loaded(model, "auto", {"cpu": max(1, int(share * size(model)))})
    assert "disk" in spread.hf_device_map.values()
    assert any(parameter.is_meta for parameter in spread.parameters())
    with torch.inference_mode():
        tokens = TOKENS % whole.config.get_text_config().vocab_size
        for _ in range(2):
            assert torch.equal(spread(tokens).logits, whole(tokens).logits)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_blocks_are_on_one_device_each(device_map, tmp_path, tiny_model):
    model = streamed(tiny_model, tmp_path)
    spread = loaded(model, device_map, {"cpu": int(0.6 * size(model))})
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    for block in model.blocks:
        assert len({parameter.is_meta for parameter in block.parameters()}) == 1


def test_what_fits_is_on_one_device(tmp_path, tiny_model):
    model = loaded(streamed(tiny_model, tmp_path), "auto")
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert set(model.hf_device_map.values()) == {"cpu"}


def test_without_a_map_it_is_the_model_itself(tmp_path, tiny_model):
    model = streamed(tiny_model, tmp_path)
    assert loaded(model, None) is model.model


def test_its_perplexity_is_that_of_the_whole_model(tmp_path, tiny_model):
    corpus = Corpus(TOKENS, "text")
    whole = streamed(tiny_model, tmp_path).load()
    spread = loaded(streamed(tiny_model, tmp_path), "auto", {"cpu": 1})
    assert spread.device.type == "meta"
    assert input_device(spread) == torch.device("cpu")
    assert perplexity(in_memory(spread, "cpu"), corpus, 2) == perplexity(
        in_memory(whole, "cpu"), corpus, 2
    )
