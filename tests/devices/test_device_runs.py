"""Whole runs on a device that is not the CPU, and their checkpoints on either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pretend_device
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from safetensors.torch import load_file
from torch import Tensor

import claq_exp
from claq_exp.cli import main
from claq_exp.errors import ConfigError
from claq_exp.runtime.bench import bench_generation
from claq_exp.runtime.linear import use_kernel

pytestmark = [
    pytest.mark.case(147),
    pytest.mark.filterwarnings("ignore:a packed layer is dequantized:RuntimeWarning"),
]

TOKENS = torch.arange(40).reshape(2, 20)
ONE_WIDTH = ("precision=fixed", "reservation=none")


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    """A model of one block: the interpreter takes its time for every column."""
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_llama(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def launched(monkeypatch) -> pretend_device.interpreted:
    """The column loop's kernel, run by the interpreter."""
    pytest.importorskip("triton")
    from claq_exp.quantize.kernels import column_step

    kernel = pretend_device.interpreted(column_step.quantize_column)
    monkeypatch.setattr(column_step, "quantize_column", kernel)
    return kernel


@pytest.fixture
def run(tiny_run, small_model, tmp_path):
    """Runs an experiment on a device; returns its checkpoint and its results."""

    def started(device: str, *words: str) -> tuple[Path, dict[str, Any]]:
        outputs = tmp_path / device
        where = [f"model.source={small_model}", f"device={device}", f"outputs={outputs}"]
        fewer = ["calibration.windows=4", "evaluation.corpora.wikipedia.windows=2"]
        assert main([*tiny_run, "model.dtype=float32", *fewer, *where, *words]) == 0
        (results,) = outputs.rglob("results.json")
        return results.parent / "checkpoint", json.loads(results.read_text())

    return started


def logits(checkpoint: Path, device: str, **options: Any) -> Tensor:
    model = claq_exp.load(checkpoint, device=device, **options)
    with torch.inference_mode():
        found = model(TOKENS.to(device)).logits
    assert found.device.type == device
    return found.cpu()


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_what_is_rounded_to_nearest_is_the_same_on_every_device(run, pretend, monkeypatch):
    monkeypatch.setattr("claq_exp.run.job.HIDDEN_SHARE", 0.0)  # hidden states are kept on disk
    words = ["experiment=rtn_4bit", "stream=true"]
    (plain, expected), (checkpoint, found) = run("cpu", *words), run(pretend, *words)
    ours, theirs = tensors(checkpoint), tensors(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for model in ("original", "quantized"):
        ours, theirs = (r["perplexity"]["wikipedia"][model] for r in (found, expected))
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert found["run"]["device"] == "Pretended device"


RUNS = {
    "widths of a column, by the kernel": ["experiment=claq_2.12", "activation=nvfp4"],
    "an allocation": ["allocation=rate_distortion", "allocation.target_bits=60"],
    "an allocated embedding": [
        *("allocation=rate_distortion", "embedding=allocated"),
        *("budget.kind=model", "budget.bits=15.9"),
    ],
    "rounded activations": [
        *("codebook=lo_bcq", *ONE_WIDTH, "runtime.kernel=auto"),
        *("activation=lo_bcq", "activation.books=local", "activation.scope=static"),
    ],
    "an embedding, by the kernel": [
        *("experiment=claq_2.12", "embedding=kmeans", "embedding.bits=4", "runtime.kernel=auto"),
    ],
    "a shared codebook, spread over devices": [
        *("codebook=kmeans", "codebook.shared=true", "codebook.row_scales=true", *ONE_WIDTH),
        *("runtime.kernel=reference", "device_map=auto"),
    ],
}


@pytest.mark.parametrize("what", RUNS)
def test_a_run_ends_with_a_checkpoint_that_computes_alike_everywhere(
    run, pretend, launched, tmp_path, what
):
    checkpoint, results = run(pretend, *RUNS[what])
    assert results["status"] == "finished"
    assert launched.launches or "by the kernel" not in what
    expected = logits(checkpoint, "cpu", kernel="dense")
    for kernel in ("auto", "reference", "dense"):
        assert torch.allclose(logits(checkpoint, pretend, kernel=kernel), expected, atol=1e-3)
    claq_exp.load(checkpoint, device=pretend).save_pretrained(tmp_path / "again")
    ours, theirs = tensors(tmp_path / "again"), tensors(checkpoint)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_kernels_are_those_of_the_device(run, pretend, monkeypatch):
    monkeypatch.setattr("claq_exp.runtime.bench.TOKENS", 2)
    monkeypatch.setattr("claq_exp.runtime.bench.REPEATS", 1)
    checkpoint, _ = run(pretend, "experiment=rtn_4bit")
    with pytest.raises(ConfigError, match=r"runtime\.kernel=cpu: .*pretend"):
        claq_exp.load(checkpoint, device=pretend, kernel="cpu")
    model = claq_exp.load(checkpoint)
    assert set(use_kernel(model, "reference").values()) == {"reference"}
    assert use_kernel(model.to(pretend), "auto").keys()
    rows = bench_generation(checkpoint, dtype="float32", device=pretend, on_step=lambda _: None)
    assert {row.kernel for row in rows} == {"dense", "reference"}


def test_a_device_that_is_not_there_is_refused_in_one_line(tiny_run, capfd):
    pretend_device.install()
    assert main([*tiny_run, "device=pretend"]) == 2
    assert "device=pretend: this machine has 0 PRETEND devices" in capfd.readouterr().err
