"""Values that are none, patterns without a match, a foreign tokenizer: one line each."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import tiny_llama

from claq_exp.cli import main


@pytest.fixture
def refusal(tiny_run, capfd):
    """Return the one line with which a plan of the tiny model is refused."""

    def refuse(*words: str) -> str:
        assert main(["plan", *tiny_run, *words]) == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1, lines
        assert lines[0].startswith("claq-exp: ")
        return lines[0]

    return refuse


@pytest.mark.case(75)
@pytest.mark.parametrize(
    ("word", "fragment"),
    [
        ("seed=${calibration.seed}", "seed"),  # a cycle: the calibration's follows the seed
        ("seed=${nothing.at.all}", "nothing.at.all"),
        ("seed=???", "seed"),
        ("seed=null", "seed"),
        ("seed=[1,2]", "seed"),
        ("precision.target_bits=[2,3]", "target_bits"),
        ("precision.target_bits={a:1}", "target_bits"),
        ("calibration=null", "calibration"),
        ("model.source=null", "source"),
    ],
)
def test_what_is_no_value_is_refused_in_one_line(word, fragment, refusal):
    assert fragment in refusal(word)


@pytest.mark.case(47)
@pytest.mark.parametrize("pattern", ["layers.7.*", "down_porj", "0.mlp"])
def test_a_layer_that_the_model_does_not_have_is_named(pattern, refusal):
    line = refusal("precision=layer_map", f"+precision.widths={{{pattern}:4,up_proj:3}}")
    assert f"'{pattern}'" in line
    assert "model.layers.0" in line


@pytest.mark.case(58)
def test_tokens_beyond_the_vocabulary_of_the_model_are_refused(
    tiny_run, tiny_model, tmp_path, capfd
):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tiny_llama(vocab_size=32).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 32
    assert main([*tiny_run, f"model.source={folder}"]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "calibration: the tokenizer gives token" in line
    assert "vocabulary has 32" in line
    assert not list(tmp_path.glob("outputs/default/*"))
