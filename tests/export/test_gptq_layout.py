"""claq-exp export format=gptq."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from uniform_models import Q_PROJ, TOKENS, grid, symmetric, unpacked, write, write_grids

from claq_exp.checkpoint.manifest import CARD
from claq_exp.checkpoint.reader import load_model
from claq_exp.checkpoint.writer import write_card
from claq_exp.cli import main
from claq_exp.errors import ConfigError
from claq_exp.export import export
from claq_exp.export.grids import _check_modules, _refuse
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import OutlierOrder
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, quantize_weight
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Nearest
from claq_exp.reporting.card import RECIPE, model_card

BITS = ("nominal", "linear", "model")
CONFIG = {
    "model": {"name": "mine", "source": "org/mine"},
    **{group: {"name": "none", "bits": None} for group in RECIPE},
}


def read_back(folder: Path, name: str, columns: int, rows: int) -> torch.Tensor:
    """A matrix of a folder in the GPTQ layout, number by number: [out, in] float64."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits = config["bits"]
    stored = {s: t for s, t in load_file(folder / "model.safetensors").items() if name in s}
    codes = unpacked(stored[f"{name}.qweight"].t(), bits, columns)
    zeros = unpacked(stored[f"{name}.qzeros"], bits, rows)
    more = {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
    scales, groups = stored[f"{name}.scales"], stored[f"{name}.g_idx"].tolist()
    assert scales.dtype == torch.float16
    return torch.tensor(
        [
            [
                float(scales[groups[i], o]) * (codes[o][i] - (zeros[groups[i]][o] + more))
                for i in range(columns)
            ]
            for o in range(rows)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_number_is_read_back(bits, group_size, tmp_path):
    made = write_grids(tmp_path / "packed", bits, group_size)
    export(tmp_path / "packed", tmp_path / "gptq", "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["quantization_config"]["group_size"] == (group_size or -1)
    assert config["quantization_config"]["sym"] is False
    for name in (Q_PROJ, "model.layers.1.mlp.down_proj"):
        rows, columns = made[name].shape
        found = read_back(tmp_path / "gptq", name, columns, rows)
        assert torch.equal(found, made[name].dequantize().double())


def test_symmetric_grids_are_in_the_older_format(tmp_path):
    made = write(
        tmp_path / "packed", lambda _, m: symmetric(grid(m.out_features, m.in_features, 4))
    )
    export(tmp_path / "packed", tmp_path / "gptq", "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (config["checkpoint_format"], config["sym"]) == ("gptq", True)
    found = read_back(tmp_path / "gptq", Q_PROJ, 64, 64)
    assert torch.equal(found, made[Q_PROJ].dequantize().double())


def test_all_else_is_as_in_the_checkpoint(tmp_path, capsys):
    write_grids(tmp_path / "packed", 4)
    words = [str(tmp_path / "packed"), str(tmp_path / "gptq"), "format=gptq"]
    assert main(["export", *words]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "gptq")
    found = load_file(tmp_path / "gptq" / "model.safetensors")
    state = load_model(tmp_path / "packed", dtype="float16").state_dict()
    kept = [name for name in state if "_proj" not in name and name != "lm_head.weight"]
    assert kept
    for name in kept:
        assert torch.equal(found[name], state[name]), name
    suffixes = {name.rpartition(".")[2] for name in set(found) - set(kept)}
    assert suffixes == {"qweight", "qzeros", "scales", "g_idx"}
    source = {path.name for path in (tmp_path / "packed").iterdir()}
    assert {path.name for path in (tmp_path / "gptq").iterdir()} == source - {"manifest.json"}
    assert main(["export", *words]) == 2  # it exists


@pytest.mark.parametrize("format_", ["dense", "gptq", "compressed-tensors"])
def test_the_card_says_what_the_folder_is(format_, tmp_path):
    write_grids(tmp_path / "packed", 4)
    card = model_card({**CONFIG, "seed": 0}, "claq-exp", dict.fromkeys(BITS, 4.0), 1)
    write_card(tmp_path / "packed", card)
    export(tmp_path / "packed", tmp_path / "new", format_)
    text = (tmp_path / "new" / CARD).read_text()
    assert f"`claq-exp export format={format_}` wrote it" in text
    assert "stay packed" not in text
    assert text.startswith(card.partition("## Load it")[0].rstrip())


def kmeans(_: str, module: torch.nn.Linear):
    recipe = Recipe(KMeans(), OutlierOrder(2.5), NoReservation(), Nearest())
    hessian = torch.eye(module.in_features, dtype=torch.float64)
    problem = LinearProblem(module.weight.detach().float(), hessian)
    return quantize_weight(problem, recipe.solver.prepare(Moments(hessian)), recipe).quantized


def widths(name: str, module: torch.nn.Linear):
    return grid(module.out_features, module.in_features, 4 if name == Q_PROJ else 2)


def five_bits(_: str, module: torch.nn.Linear):
    return grid(module.out_features, module.in_features, 5)


def groups(name: str, module: torch.nn.Linear):
    return grid(module.out_features, module.in_features, 4, 16 if name == Q_PROJ else 32)


@pytest.mark.parametrize(
    ("make", "format_", "said"),
    [
        (kmeans, "gptq", "down_proj is stored as column codebooks, .* use format=dense"),
        (kmeans, "compressed-tensors", "down_proj is stored as .* codebook=uniform"),
        (five_bits, "gptq", "down_proj has codes of 5 bits.* another number of bits"),
        (widths, "gptq", "q_proj has 4 bits and .*down_proj 2: .* use format=compressed-tensors"),
        (groups, "gptq", "q_proj has groups of 16 columns and another layer of 32"),
    ],
)
def test_what_cannot_be_said_is_refused(make, format_, said, tmp_path):
    write(tmp_path / "packed", make)
    with pytest.raises(ConfigError, match=said) as caught:
        export(tmp_path / "packed", tmp_path / "new", format_)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_conv1d_is_refused_without_advice_that_would_not_help():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8))
    with pytest.raises(ConfigError, match=r"is a Conv1D, .* cannot say it; use"):
        _check_modules(model, {"transformer.h.0.attn.c_attn": None}, partial(_refuse, "gptq"))


def test_codes_that_fill_no_word_are_refused(tmp_path):
    write(
        tmp_path / "packed",
        lambda _, m: grid(m.out_features, m.in_features, 3),
        intermediate_size=72,
    )
    said = "has 72 inputs: their codes of 3 bits fill no whole .* use format=dense"
    with pytest.raises(ConfigError, match=said):
        export(tmp_path / "packed", tmp_path / "new", "gptq")
    with pytest.raises(ConfigError, match="72 inputs, no multiple of its group size 32"):
        export(tmp_path / "packed", tmp_path / "new", "compressed-tensors")


def test_a_place_where_nothing_can_be_written_is_refused_before_any_work(
    tmp_path, monkeypatch, capsys
):
    packed, file = tmp_path / "packed", tmp_path / "file"
    write_grids(packed, 4)
    file.write_text("mine")
    with pytest.raises(ConfigError, match=f"'{file}' is a file"):
        export(packed, file / "new")
    with pytest.raises(ConfigError, match="in the checkpoint itself"):
        export(packed, packed / "deep" / "new")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match=f"'{tmp_path}' is read-only"):
        export(packed, tmp_path / "far" / "new")
    assert main(["export", str(packed), "x", "model.trust_remote_code=maybe"]) == 2
    assert "choose one of: false, true" in capsys.readouterr().err
    assert not (tmp_path / "far").exists()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_reads_equal_weights(bits, tmp_path):
    """Its own reader of the layout: transformers with optimum and gptqmodel."""
    pytest.importorskip("gptqmodel", exc_type=ImportError)
    pytest.importorskip("optimum.gptq", exc_type=ImportError)
    from transformers import AutoModelForCausalLM

    made = write_grids(tmp_path / "packed", bits)
    export(tmp_path / "packed", tmp_path / "gptq", "gptq", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gptq", dtype=torch.float32)
    for name, weight in made.items():
        found = model.get_submodule(name).dequantize_weight().t()
        torch.testing.assert_close(found.float(), weight.dequantize(), rtol=1e-3, atol=0)
    with torch.inference_mode():
        expected = load_model(tmp_path / "packed")(TOKENS).logits
        found = model(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
