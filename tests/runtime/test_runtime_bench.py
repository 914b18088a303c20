"""`claq-exp bench runtime` on a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantized_checkpoints import write
from transformers import AutoModelForCausalLM, AutoTokenizer

from claq_exp.checkpoint.reader import read_layouts
from claq_exp.cli import main
from claq_exp.compose.experiment import compose_config
from claq_exp.reporting.bench import generation_table, linear_table
from claq_exp.runtime import bench
from claq_exp.runtime.bench import GenerationRow, bench_checkpoint, kernels_for


@pytest.fixture
def checkpoint(tiny_model: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return write(model, tokenizer, "model.layers", tmp_path / "checkpoint")


def test_each_kernel_generates_beside_dense_weights(checkpoint, monkeypatch):
    monkeypatch.setattr(bench, "TOKENS", 4)
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0.01)
    steps: list[str] = []
    config = compose_config([f"checkpoint={checkpoint}", "device=cpu"])
    found = bench_checkpoint(config, steps.append)
    rows = {row.kernel: row for row in found.generation}
    assert list(rows) == ["dense", "cpu", "reference"]
    weights = sum(layout.weights for layout in read_layouts(checkpoint).values())
    assert rows["dense"].linear_bytes == 4 * weights
    assert rows["reference"].linear_bytes < 4 * weights
    assert all(row.tokens_per_second > 0 for row in found.generation if not row.note)
    shapes = {(row.rows, row.columns) for row in found.linears}
    assert shapes == {(48, 48), (24, 48), (72, 48), (48, 72)}
    assert all(row.seconds["dense"] > 0 and "reference" in row.seconds for row in found.linears)
    assert len(steps) == 4
    assert linear_table(found.linears).row_count == len(found.linears)


def test_a_kernel_that_cannot_be_used_says_why():
    rows = [
        GenerationRow("dense", 10.0, 100),
        GenerationRow("cpu", None, None, "no [bold] compiler"),
    ]
    table = generation_table(rows, 64)
    assert list(table.columns[2].cells) == ["1.00", ""]
    assert list(table.columns[4].cells) == ["", "no \\[bold] compiler"]


def test_kernels_of_a_device():
    assert kernels_for("cpu") == ["cpu", "reference"]
    assert kernels_for("cuda:1") == ["triton", "reference"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["bench"], "claq-exp bench runtime checkpoint=FOLDER"),
        (["bench", "speed"], "claq-exp bench runtime checkpoint=FOLDER"),
        (["bench", "runtime"], "bench needs checkpoint=FOLDER"),
        (["bench", "runtime", "checkpoint=/nowhere"], "'/nowhere' does not exist"),
        (["bench", "runtime", "runtime.kernel=fast"], "runtime.kernel 'fast' is not known"),
    ],
)
def test_wrong_requests(words, line, capfd):
    assert main(words) == 2
    assert line in capfd.readouterr().err
