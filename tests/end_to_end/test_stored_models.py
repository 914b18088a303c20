"""Runs of folders whose tensors say more than their config: what is quantized is what is stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import claq_exp
from claq_exp.cli import main

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NORM = "model.layers.0.input_layernorm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def words(tiny_run: list[str], folder: Path) -> list[str]:
    return [*(w for w in tiny_run if not w.startswith("model.source=")), f"model.source={folder}"]


def store(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def run_folder(tmp_path: Path) -> Path:
    (results,) = (tmp_path / "outputs").rglob("results.json")
    return results.parent


def results_of(tmp_path: Path) -> dict:
    found: dict = json.loads((run_folder(tmp_path) / "results.json").read_text())
    return found


def source_events(tmp_path: Path) -> list[dict]:
    lines = (run_folder(tmp_path) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "source"]


def logits(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(torch.arange(16)[None]).logits
    return found


@pytest.mark.case(106)
@pytest.mark.parametrize("stream", [False, True])
def test_a_run_quantizes_the_untied_model_and_its_checkpoint_says_so(
    stream, tiny_run, folder, tmp_path, capfd
):
    generator = torch.Generator().manual_seed(1)
    head = (0.02 * torch.randn(256, 48, generator=generator)).half()
    store(folder, lambda tensors: tensors.update({HEAD: head}))
    run = [*words(tiny_run, folder), "embedding=none", f"stream={str(stream).lower()}"]
    assert main(["plan", *run]) == 0
    assert "untied, as transformers loads it" in capfd.readouterr().out
    assert main(run) == 0
    assert "untied, as transformers loads it" in capfd.readouterr().out
    results = results_of(tmp_path)
    assert results["source"]["untied"] == [HEAD]
    assert source_events(tmp_path)[0]["untied"] == [HEAD]
    checkpoint = run_folder(tmp_path) / "checkpoint"
    assert json.loads((checkpoint / "config.json").read_text())["tie_word_embeddings"] is False
    stored = load_file(checkpoint / "model.safetensors")
    assert torch.equal(stored[HEAD], head)
    parameters = 8 * results["size"]["checkpoint_bytes"] / results["bits"]["model"]
    assert parameters == pytest.approx(
        sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    )
    ours = logits(claq_exp.load(checkpoint))
    assert main(["export", str(checkpoint), str(tmp_path / "dense"), "dtype=float32"]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(dense.get_parameter(HEAD), head.float())
    assert torch.allclose(logits(dense), ours, atol=1e-4)


@pytest.mark.case(108)
def test_a_run_tells_which_tensors_it_left_out_and_strictly_refuses(
    tiny_run, folder, tmp_path, capfd
):
    store(folder, lambda tensors: tensors.update({BIAS: torch.ones(48).half()}))
    run = words(tiny_run, folder)
    for command in ([], ["plan"], ["fetch"]):
        assert main([*command, *run]) == 0
        assert f"left out, e.g. {BIAS}" in capfd.readouterr().out, command
    assert results_of(tmp_path)["source"]["unused_tensors"] == 1
    assert source_events(tmp_path)[0]["unused_examples"] == [BIAS]
    assert main(run) == 0  # found finished, and still told
    assert f"left out, e.g. {BIAS}" in capfd.readouterr().out
    for command in ([], ["plan"], ["fetch"]):
        assert main([*command, *run, "strict=true"]) == 1
        assert "strict=true, and 1 stored tensor has no place" in capfd.readouterr().err


def with_huge_norm(tensors: dict[str, Tensor]) -> None:
    """The same function, with one gain beyond float16 and the weights behind it that much less."""
    tensors.update({name: tensor.float() for name, tensor in tensors.items()})
    tensors[NORM][3] *= 2.0**18
    for part in "qkv":
        tensors[f"model.layers.0.self_attn.{part}_proj.weight"][:, 3] /= 2.0**18
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})


@pytest.mark.case(110, 111)
def test_a_gain_beyond_float16_is_kept_in_the_type_that_it_is_stored_in(
    tiny_run, folder, tmp_path, capfd
):
    store(folder, with_huge_norm)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dtype") == "float16"
    (folder / "config.json").write_text(json.dumps(config))
    run = words(tiny_run, folder)
    assert main(run) == 0
    results = results_of(tmp_path)
    assert results["perplexity"]["wikipedia"]["quantized"] is not None
    checkpoint = run_folder(tmp_path) / "checkpoint"
    gain = load_file(checkpoint / "model.safetensors")[NORM]
    assert torch.equal(gain, load_file(folder / "model.safetensors")[NORM])
    capfd.readouterr()
    refused = [
        ["export", str(checkpoint), str(tmp_path / "dense")],
        ["evaluate", f"checkpoint={checkpoint}", "model.dtype=float16", *run[4:]],
        [*run, "model.dtype=float16"],
    ]
    for command in refused:
        assert main(command) == 1
        assert f"{NORM}[3] is " in capfd.readouterr().err
    assert not (tmp_path / "dense").exists()
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert main(run) == 1
    assert 'write "dtype": "bfloat16" into' in capfd.readouterr().err
