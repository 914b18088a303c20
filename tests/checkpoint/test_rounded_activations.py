"""Checkpoints in block formats that round activations: every loader gives the same model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from packed_models import Written, change_json
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from claq_exp.checkpoint.manifest import write_manifest
from claq_exp.checkpoint.reader import open_checkpoint, read_rounding
from claq_exp.checkpoint.writer import PackedWeight, write_checkpoint
from claq_exp.cli import main
from claq_exp.errors import CheckpointError
from claq_exp.evaluation.predict import streamed
from claq_exp.models.activations import round_inputs
from claq_exp.models.load import load_model as load_original
from claq_exp.quantize.activation import Int, LoBcq, MxFp4
from claq_exp.quantize.activation.rounding import Observed, Rounding, settle_rounding
from claq_exp.quantize.codebook import block_formats
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, quantize_weight
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Nearest
from claq_exp.runtime.load import load_checkpoint
from claq_exp.system.files import read_json

TOKENS = torch.arange(24).reshape(2, 12)
ACTIVATIONS = {
    "lo_bcq": LoBcq(),
    "mxfp4": MxFp4(),
    "int static": Int(bits=8, scope="static"),
    "none": None,
}
WEIGHTS = {
    "q_proj": block_formats.LoBcq(),
    "k_proj": block_formats.NvFp4(),
    "v_proj": block_formats.Vsq(),
    "o_proj": block_formats.MxFp4(),
    "mlp": block_formats.Bfp(),
}


class Rounded:
    """A model whose blocks are quantized, with the rounding of its activations."""

    def __init__(self, source: Path, activation: object) -> None:
        self.model = load_original(source, dtype="float32", device="cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.packed = {}
        for name, module in self.model.model.layers.named_modules(prefix="model.layers"):
            if isinstance(module, nn.Linear):
                codebook = next(value for key, value in WEIGHTS.items() if key in name)
                recipe = Recipe(codebook, Fixed(4), NoReservation(), Nearest())
                hessian = torch.eye(module.in_features, dtype=torch.float64)
                problem = LinearProblem(module.weight.detach(), hessian)
                found = quantize_weight(
                    problem, recipe.solver.prepare(Moments(hessian)), recipe
                ).quantized
                self.packed[name] = PackedWeight(found.layout(), found.pack())
                module.weight.data.copy_(found.dequantize())
        maxima = {name: 1.0 + place for place, name in enumerate(self.packed)}
        self.rounding = None
        if activation is not None:
            self.rounding = settle_rounding(activation, Observed(maxima, ()))

    def write(self, target: Path) -> Path:
        arguments = (self.model, self.tokenizer, self.packed, torch.float16)
        write_checkpoint(target, *arguments, rounding=self.rounding)
        return target

    def logits(self) -> torch.Tensor:
        model = copy.deepcopy(self.model)
        round_inputs(model, self.rounding, self.packed)
        with torch.inference_mode():
            return model(TOKENS).logits


@pytest.fixture(scope="module", params=ACTIVATIONS)
def rounded(request, tiny_model) -> Rounded:
    return Rounded(tiny_model, ACTIVATIONS[request.param])


@pytest.fixture(scope="module")
def checkpoint(rounded, tmp_path_factory) -> Path:
    return rounded.write(tmp_path_factory.mktemp("rounded") / "checkpoint")


@pytest.mark.case(119)
def test_the_base_model_rounds_as_the_whole_does(checkpoint):
    base = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(base(TOKENS)[0], whole.model(TOKENS)[0])


def test_every_loader_gives_the_model_that_was_written(rounded, checkpoint):
    expected = rounded.logits()
    with torch.inference_mode():
        assert torch.equal(load_checkpoint(checkpoint, kernel="dense")(TOKENS).logits, expected)
        packed = load_checkpoint(checkpoint, kernel="reference")
        assert torch.equal(packed(TOKENS).logits, expected)
        plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        with pytest.warns(RuntimeWarning, match="no CPU kernel for block formats"):
            assert torch.equal(plain(TOKENS).logits, expected)
    (found,) = streamed(open_checkpoint(checkpoint))([TOKENS], lambda _: None)
    assert torch.equal(found, expected)


def test_a_loaded_model_is_saved_with_its_rounding(rounded, checkpoint, tmp_path):
    model = load_checkpoint(checkpoint, kernel="reference")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.inference_mode(), pytest.warns(RuntimeWarning, match="block formats"):
        assert torch.equal(again(TOKENS).logits, rounded.logits())
    written = read_json(checkpoint / "config.json")["quantization_config"]
    assert read_json(tmp_path / "again" / "config.json")["quantization_config"] == written


def test_the_rounding_that_is_read_is_the_rounding_that_was_written(rounded, checkpoint):
    found = read_rounding(checkpoint)
    if rounded.rounding is None:
        assert found is None
        return
    assert isinstance(found, Rounding)
    assert found.to_json() == rounded.rounding.to_json()
    assert (found.scope == "static") == bool(found.maxima)


def test_activations_matter(rounded):
    if rounded.rounding is None:
        return
    with torch.inference_mode():
        plain = rounded.model(TOKENS).logits
    assert not torch.equal(rounded.logits(), plain)


@pytest.fixture(scope="module")
def lo_bcq_checkpoint(tiny_model, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("rounded") / "checkpoint"
    return Rounded(tiny_model, LoBcq()).write(place)


def test_an_array_beyond_any_row_takes_no_more_memory_than_the_row():
    rounding = settle_rounding(MxFp4(array=2**40), None)
    values = torch.linspace(-3, 3, 100).reshape(2, 50)
    assert torch.equal(rounding.round(values), settle_rounding(MxFp4(array=50), None).round(values))


SOME = "model.layers.0.self_attn.q_proj"
DAMAGES = {
    "a key more": lambda q: q["activation"].update(more=1),
    "no format": lambda q: q["activation"].pop("format"),
    "a huge array": lambda q: q["activation"]["format"].update(array=10),
    "codebooks that descend": lambda q: q["activation"]["codebooks"][0].reverse(),
    "a codeword beyond its bits": lambda q: q["activation"]["codebooks"][7].__setitem__(15, 99),
    "a codeword that is no number": lambda q: q["activation"]["codebooks"][7].__setitem__(3, "x"),
    "too few codebooks": lambda q: q["activation"]["codebooks"].pop(),
    "another scope": lambda q: q["activation"].update(scope="static"),
    "maxima of nothing": lambda q: q["activation"].update(maxima={"x": 1.0}),
    "activation is a list": lambda q: q.update(activation=[]),
    "version 2": lambda q: q.update(format_version=2),
    "a layout without its format": lambda q: q["modules"][SOME].pop("block_format"),
    "a format of another kind": lambda q: q["modules"][SOME].update(kind="row_grid"),
    "another array": lambda q: q["modules"][SOME]["block_format"].update(array=32),
    "another scale": lambda q: q["modules"][SOME]["block_format"].update(scale="outer"),
    "a format that is a number": lambda q: q["modules"][SOME].update(block_format=3),
    "bits that are no number": lambda q: q["modules"][SOME]["block_format"].update(bits="4"),
    "codes of another width": lambda q: q["modules"][SOME]["block_format"].update(bits=3),
}


@pytest.mark.case(67)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("kernel", ["dense", "reference"])
def test_a_description_that_does_not_fit_is_refused(lo_bcq_checkpoint, tmp_path, damage, kernel):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in lo_bcq_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change_json(folder / "config.json", lambda data: damage(data["quantization_config"]))
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=r"checkpoint"):
        load_checkpoint(folder, kernel=kernel)


def test_a_checkpoint_without_rounding_has_no_such_key(tiny_model, tmp_path):
    folder = Written(tiny_model).write(tmp_path / "checkpoint")
    quantization = read_json(folder / "config.json")["quantization_config"]
    assert quantization["format_version"] == 4
    assert "activation" not in quantization


def test_inspect_and_dequantize_tell_of_rounded_activations(
    lo_bcq_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["inspect", str(lo_bcq_checkpoint)]) == 0
    text = capsys.readouterr().out
    assert "4 bits: 8 learned codebooks, arrays of 64 (e4m3), a scale above for each token" in text
    assert "e2m1, arrays of 16 (e4m3)" in text
    assert main(["export", str(lo_bcq_checkpoint), str(tmp_path / "plain")]) == 0
    assert "a plain folder does not round activations" in capsys.readouterr().out
