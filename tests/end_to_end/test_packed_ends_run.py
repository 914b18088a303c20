"""Runs that quantize the embedding and the head: planned, killed, measured, reported."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import claq_exp
import claq_exp.run.ends
from claq_exp.checkpoint.reader import read_layouts
from claq_exp.cli import main
from claq_exp.compose.experiment import compose_config
from claq_exp.errors import ConfigError
from claq_exp.models.ends import EndsError, is_end
from claq_exp.reporting.labels import method_label
from claq_exp.run.ends import OwnEnds
from claq_exp.run.plan import plan_for

TOKENS = torch.arange(40).reshape(2, 20)
SMALL = ["calibration.windows=4", "evaluation.corpora.wikipedia.windows=2"]


@pytest.fixture
def run(tiny_run, tmp_path):
    """Runs an experiment; returns its folder and results."""

    def started(*words: str, outputs: str = "outputs") -> tuple[Path, dict]:
        place = tmp_path / outputs
        assert main([*tiny_run, *SMALL, f"outputs={place}", *words]) == 0
        (results,) = place.rglob("results.json")
        return results.parent, json.loads(results.read_text())

    return started


def logits(checkpoint: Path, **options) -> torch.Tensor:
    with torch.inference_mode():
        return claq_exp.load(checkpoint, **options)(TOKENS).logits


@pytest.mark.parametrize(
    "words", [["embedding=kmeans"], ["embedding=uniform", "embedding.bits=4", "stream=true"]]
)
def test_what_is_planned_of_a_tied_model_is_on_disk(words, run, tiny_run):
    plan = plan_for(compose_config([*tiny_run, *SMALL, *words]), "cpu")
    folder, results = run(*words)
    assert plan.sizes.bytes == results["size"]["checkpoint_bytes"]
    assert plan.sizes.ledger.as_dict() == results["bits"]["ledger"]
    assert results["bits"]["ledger"]["embedding"] > 0
    (end,) = plan.ends
    assert read_layouts(folder / "checkpoint")[end.name] == end.layout()
    rows = list(csv.DictReader((folder / "layers.csv").open()))
    assert len(rows) == 3 * 7 + 1
    assert (rows[-1]["name"], rows[-1]["block"]) == ("model.embed_tokens", "")
    assert int(rows[-1]["tokens"]) == 4 * 64
    assert logits(folder / "checkpoint", kernel="dense").isfinite().all()


def test_linear_bits_stay_and_model_bits_fall(run):
    _, plain = run("embedding=none", outputs="plain")
    _, packed = run("embedding=kmeans", "embedding.bits=6", outputs="packed")
    assert packed["bits"]["nominal"] == plain["bits"]["nominal"]
    assert packed["bits"]["linear"] == pytest.approx(plain["bits"]["linear"], rel=0.02)
    for account in ("codes", "codebooks", "scales", "reserved_values", "column_bits"):
        assert packed["bits"]["ledger"][account] == plain["bits"]["ledger"][account]
    assert packed["bits"]["model"] < plain["bits"]["model"]
    assert plain["bits"]["ledger"]["embedding"] == 0


def test_every_way_to_load_it_gives_the_same(untied, run, tmp_path):
    words = [f"model.source={untied}", "embedding=kmeans", "embedding.bits=5", "head=uniform"]
    folder, results = run(*words)
    checkpoint = folder / "checkpoint"
    ends = {name for name in read_layouts(checkpoint) if is_end(name)}
    assert ends == {"model.embed_tokens", "lm_head"}
    rows = {row["name"]: row for row in csv.DictReader((folder / "layers.csv").open())}
    assert (rows["model.embed_tokens"]["tokens"], rows["lm_head"]["tokens"]) == ("", "256")
    assert results["fallbacks"]["layers"] == 0
    dense = logits(checkpoint, kernel="dense")
    torch.testing.assert_close(logits(checkpoint), dense, rtol=1e-3, atol=1e-3)
    assert main(["export", str(checkpoint), str(tmp_path / "dense"), "dtype=float32"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(plain(TOKENS).logits, dense)
    _, packed = run(*words, "runtime.kernel=auto", outputs="packed")
    for name, row in results["perplexity"].items():
        again = packed["perplexity"][name]["quantized"]
        assert again == pytest.approx(row["quantized"], rel=1e-4)


def test_the_base_model_has_a_packed_embedding_and_no_head(untied, run):
    folder, _ = run(f"model.source={untied}", "embedding=kmeans")
    base, report = AutoModel.from_pretrained(
        folder / "checkpoint", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    whole = claq_exp.load(folder / "checkpoint")
    with torch.inference_mode():
        expected = whole(TOKENS, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(base(TOKENS).last_hidden_state, expected)


def test_inspect_and_plan_name_the_embedding(run, tiny_run, capsys):
    folder, _ = run("embedding=kmeans")
    capsys.readouterr()
    assert main(["inspect", str(folder), "--layers"]) == 0
    told = capsys.readouterr().out
    assert "21 with" in told
    assert "model.embed_tokens" in told
    assert "256 x 48" in told
    assert main(["plan", *tiny_run, "embedding=kmeans"]) == 0
    assert "model.embed_tokens" in capsys.readouterr().out


def test_pictures_and_reports_are_about_blocks_and_evaluate_counts_the_same(
    run, tiny_run, tmp_path, drawn, capsys
):
    folder, results = run("embedding=kmeans")
    assert (folder / "layers.png").stat().st_size > 1000
    assert main(["report", str(tmp_path / "outputs"), "--into", str(tmp_path / "report")]) == 0
    assert "kmeans 8" in (tmp_path / "report" / "report.csv").read_text()
    assert method_label(results["config"]).endswith("embedding kmeans 8")
    words = [word for word in tiny_run if not word.startswith(("model", "calibration"))]
    words = [*words, *SMALL[1:], f"checkpoint={folder}", "original=false"]
    assert main(["evaluate", *words, f"outputs={tmp_path / 'evaluated'}"]) == 0
    (found,) = (tmp_path / "evaluated").rglob("results.json")
    again = json.loads(found.read_text())
    assert again["bits"] == results["bits"]
    assert again["perplexity"]["wikipedia"]["quantized"] == pytest.approx(
        results["perplexity"]["wikipedia"]["quantized"]
    )


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", ["embedding", "head"])
def test_a_run_that_ends_at_the_embedding_or_head_goes_on_to_the_same_bytes(
    step, moment, untied, run, tiny_run, tmp_path, monkeypatch
):
    words = [f"model.source={untied}", "embedding=kmeans_4bit", "solver.asymmetric=0.5"]
    if step == "head":
        words = ["embedding=kmeans_4bit"]  # the one matrix of a tied model
    expected, _ = run(*words, outputs="undisturbed")
    whole, calls = getattr(OwnEnds, step), []

    def ended(*arguments, **options):
        calls.append("")
        if moment == "after":
            whole(*arguments, **options)
        raise OSError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(OwnEnds, step, ended)
        assert main([*tiny_run, *SMALL, *words, f"outputs={tmp_path / 'again'}"]) == 1
    folder, _ = run(*words, "resume=required", outputs="again")
    assert calls
    ours, theirs = (load_file(f / "checkpoint/model.safetensors") for f in (folder, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_whose_embedding_cannot_be_packed_keeps_it_by_default(
    run, tiny_run, tmp_path, monkeypatch, capsys
):
    def odd(model):
        raise EndsError("the embedding of LlamaForCausalLM is odd; set embedding=none")

    monkeypatch.setattr(claq_exp.run.ends, "find_ends", odd)
    kept = "the embedding of LlamaForCausalLM is odd; embedding and head stay in 16 bits"
    folder, results = run()
    assert f"Note: {kept}" in capsys.readouterr().out
    assert results["fallbacks"]["embedding"] == kept
    assert results["fallbacks"]["layers"] == 0
    assert not any(is_end(name) for name in read_layouts(folder / "checkpoint"))
    words = [*tiny_run, *SMALL, f"outputs={tmp_path / 'outputs'}"]
    assert main(["plan", *words]) == 0
    assert f"Note: {kept}" in capsys.readouterr().out
    for asked in ("embedding=kmeans", "embedding.required=true", "head=uniform", "strict=true"):
        assert main([*words, asked]) == 2  # the first finds the finished run
        assert "is odd; set embedding=none" in " ".join(capsys.readouterr().err.split())


def test_adapters_go_on_top_of_a_packed_embedding(run):
    peft = pytest.importorskip("peft")
    folder, _ = run("embedding=kmeans", "embedding.bits=4")
    model = claq_exp.load(folder / "checkpoint")
    with torch.inference_mode():
        before = model(TOKENS).logits
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits, before)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(gradient is not None for gradient in trained.values())
    with pytest.raises(ConfigError, match="cannot be resized"):
        model.resize_token_embeddings(300)
