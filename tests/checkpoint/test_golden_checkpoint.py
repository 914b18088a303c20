"""Checkpoints that earlier releases wrote load for ever, with the numbers that they had."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from claq_exp.checkpoint.reader import read_layouts, read_rounding, read_weights
from claq_exp.checkpoint.writer import FORMAT_VERSION
from claq_exp.payload import PAYLOAD
from claq_exp.runtime.load import load_checkpoint  # teaches transformers the format

DATA = Path(__file__).parents[1] / "data"
TOKENS = 7 * torch.arange(12).reshape(1, 12)

# Of the release that wrote the checkpoint: sha256 over the name of each matrix and its dequantized
# entries, and logits of `TOKENS` at tokens 0, 3, 7, 11 and vocabulary entries 1, 50, 123, 255.
GOLDEN = {
    2: (
        "19b6af1c56e97abc66ed85514f9031cb01da3655f5ffaf41e570900ecc162c73",
        [
            [-0.8479, 0.5222, -0.5270, -0.6198],
            [0.2092, 0.5168, -0.5994, -0.2235],
            [-1.2206, -0.4332, -1.2454, 0.5139],
            [-0.9534, -0.1872, -1.6029, -0.3366],
        ],
    ),
    3: (
        "b789f5b02b48f51f80b76fe11c9b9cf9b96b7c7182bc39cb2307c518c1a8331b",
        [
            [-0.5666, 0.2931, -1.0282, -0.0966],
            [0.6247, 0.2191, -0.2973, 0.1214],
            [-0.7093, -0.4342, -1.1135, 0.5424],
            [-0.4155, -0.2526, -1.1734, 0.0604],
        ],
    ),
    4: (
        "975780288fcf4bb193bd23d092bcc15aee3b78e203ee108dcc110a87a464d039",
        [
            [-0.4936, 0.2018, -0.8372, -0.0972],
            [0.4996, 0.1097, -0.3891, -0.1945],
            [-0.7457, -0.3654, -1.2384, 0.3704],
            [-0.3243, -0.2414, -1.0791, -0.0933],
        ],
    ),
}


def test_there_is_a_checkpoint_of_every_version_that_can_be_read():
    folders = {path.name for path in DATA.glob("format_?")}
    assert folders == {f"format_{version}" for version in GOLDEN}
    assert max(GOLDEN) == FORMAT_VERSION
    for version in GOLDEN:
        size = sum(path.stat().st_size for path in (DATA / f"format_{version}").iterdir())
        assert size < 100_000


@pytest.mark.case(69)
@pytest.mark.parametrize("version", GOLDEN)
def test_its_matrices_are_those_that_were_written_to_the_bit(version):
    digest = hashlib.sha256()
    for name, weight in sorted(read_weights(DATA / f"format_{version}")):
        digest.update(name.encode() + weight.dequantize().contiguous().numpy().tobytes())
    assert digest.hexdigest() == GOLDEN[version][0]


@pytest.mark.filterwarnings("ignore:a packed layer is dequantized")
@pytest.mark.parametrize("kernel", ["dense", "reference", "auto"])
@pytest.mark.parametrize("version", GOLDEN)
def test_its_logits_are_those_that_were_written(version, kernel):
    model = load_checkpoint(DATA / f"format_{version}", kernel=kernel)
    with torch.inference_mode():
        found = model(TOKENS).logits[0, [0, 3, 7, 11]][:, [1, 50, 123, 255]]
    assert torch.allclose(found, torch.tensor(GOLDEN[version][1]), atol=2e-4, rtol=0)


@pytest.mark.parametrize("version", GOLDEN)
def test_transformers_loads_it_and_saves_it_again_as_it_was(version, tmp_path):
    folder = DATA / f"format_{version}"
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    assert read_layouts(tmp_path) == read_layouts(folder)
    again = dict(read_weights(tmp_path))
    for name, weight in read_weights(folder):
        for suffix, tensor in weight.pack().items():
            assert torch.equal(again[name].pack()[suffix], tensor), f"{name}.{suffix}"


def test_the_last_version_has_all_kinds_of_payload_two_files_and_a_tokenizer():
    folder = DATA / f"format_{max(GOLDEN)}"
    layouts = read_layouts(folder).values()
    later = read_layouts(DATA / f"format_{max(GOLDEN)}_later").values()
    assert {layout.kind for layout in [*layouts, *later]} == set(PAYLOAD)
    formats = [layout.block_format for layout in layouts if layout.kind == "block_format"]
    assert {block_format.scale for block_format in formats} == {"e4m3", "e8m0", "integer"}
    assert read_rounding(folder).scope == "static"
    books = [layout for layout in layouts if layout.kind.endswith("_codebooks")]
    assert {layout.row_scaled for layout in books} == {True, False}
    assert any(len(layout.widths()) > 1 and layout.reserved for layout in layouts)
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert AutoTokenizer.from_pretrained(folder).decode([65, 66])
