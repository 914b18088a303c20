"""KL divergence is what a slow float64 computation gives, also from logits kept in float16."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM

import claq_exp
from claq_exp.cli import main
from claq_exp.config import CorpusConfig, EvaluationConfig
from claq_exp.errors import CheckpointError
from claq_exp.evaluation.divergence import (
    Comparison,
    Divergence,
    LogitStore,
    divergences,
    rounded,
)
from claq_exp.evaluation.measure import Meter
from claq_exp.evaluation.perplexity import Corpus
from claq_exp.evaluation.predict import Subject
from claq_exp.evaluation.scores import ScoreStore
from claq_exp.run.results import kl_rows


def logits(tokens: int, vocabulary: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(tokens, vocabulary, generator=generator)


def slow(p_logits: list[float], q_logits: list[float]) -> float:
    """KL of two softmaxes by its definition, one entry at a time."""

    def log_softmax(values: list[float]) -> list[float]:
        top = max(values)
        total = math.log(math.fsum(math.exp(value - top) for value in values))
        return [value - top - total for value in values]

    pairs = zip(log_softmax(p_logits), log_softmax(q_logits), strict=True)
    return math.fsum(math.exp(log_p) * (log_p - log_q) for log_p, log_q in pairs)


def second_moment(scores: torch.Tensor) -> torch.Tensor:
    """E[z^2] of logits shifted to a maximum of 0, under their softmax, for each row."""
    z = scores.double() - scores.double().amax(-1, keepdim=True)
    return (z.softmax(-1) * z.square()).sum(-1)


SIZES = {
    "tokens": st.integers(1, 5),
    "vocabulary": st.integers(1, 40),
    "scale": st.sampled_from([0.0, 0.1, 3.0, 30.0, 600.0]),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=60)
@given(**SIZES)
def test_it_equals_the_definition_and_torchs_own(tokens, vocabulary, scale, seed):
    before, after = (logits(tokens, vocabulary, scale, seed + i) for i in (0, 1))
    kl, agrees = divergences(before, after)
    exact = [slow(p, q) for p, q in zip(before.tolist(), after.tolist(), strict=True)]
    assert kl.tolist() == pytest.approx(exact, rel=1e-10, abs=1e-11)
    if scale < 100:  # beyond, torch.distributions clamps probabilities
        theirs = kl_divergence(*(Categorical(logits=x.double()) for x in (before, after)))
        assert kl.tolist() == pytest.approx(theirs.tolist(), rel=1e-10, abs=1e-11)
    tops = [
        p.index(max(p)) == q.index(max(q))
        for p, q in zip(before.tolist(), after.tolist(), strict=True)
    ]
    assert agrees.tolist() == tops


@settings(max_examples=60)
@given(**SIZES)
def test_it_is_never_negative_and_zero_for_itself(tokens, vocabulary, scale, seed):
    before, after = (logits(tokens, vocabulary, scale, seed + i) for i in (0, 1))
    assert (divergences(rounded(before), after)[0] >= -1e-12).all()
    nearly = before + 1e-4 * after
    assert (divergences(rounded(before), nearly)[0] >= -1e-12).all()
    kl, agrees = divergences(before, before)
    assert kl.tolist() == [0.0] * tokens
    assert agrees.all()
    kl, _ = divergences(before.double(), before.double() + 5.0)  # a softmax sees no shift
    assert kl.abs().max() < 1e-11


def test_it_is_not_symmetric_and_starts_from_the_first():
    before, after = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3.0)]])
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergences(before, after)[0].item() == pytest.approx(forward, rel=1e-6)
    backward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergences(after, before)[0].item() == pytest.approx(backward, rel=1e-6)


def test_tokens_that_are_ruled_out():
    out = -math.inf
    before = torch.tensor([[1.0, 1.0, out], [1.0, 1.0, out], [1.0, 1.0, 0.0]])
    after = torch.tensor([[1.0, 1.0, out], [1.0, 1.0, 1.0], [1.0, 1.0, out]])
    kl, agrees = divergences(rounded(before), after)
    assert kl.tolist() == pytest.approx([0.0, math.log(1.5), math.inf])
    assert agrees.all()


@pytest.mark.parametrize("broken", ["original", "quantized", "both"])
def test_nan_stays_nan_and_agrees_with_nothing(broken):
    before, after = torch.ones(2, 4), torch.ones(2, 4)
    if broken != "quantized":
        before[1, 0] = math.nan
    if broken != "original":
        after[1, 0] = math.nan
    kl, agrees = divergences(rounded(before), after)
    assert kl[0] == 0.0
    assert math.isnan(kl[1])
    assert agrees.tolist() == [True, False]


# Rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.3, 2.0, 4.0, 20.0])
def test_rounding_stays_within_its_bound(scale, dtype):
    exact = (logits(8, 50_000, scale) + 17.3).to(dtype)
    kept = rounded(exact)
    assert kept.dtype == torch.float16
    kl, agrees = divergences(kept, exact)
    assert agrees.all()
    assert (kl <= 1.01 * 2.0**-23 * second_moment(exact) + 1e-12).all()
    assert kl.max() < 1.2e-5


def test_no_logits_round_worse_than_the_bound():
    top = torch.zeros(1)
    worst = 0.0
    for depth in np.linspace(4.0, 14.0, 101):
        shape = torch.full((2**18 - 1,), -float(depth))
        worst = max(worst, second_moment(torch.cat([top, shape])[None]).item() * 2.0**-23)
    assert 1.1e-5 < worst < 1.2e-5


def test_the_divergence_of_another_model_hardly_moves_by_rounding():
    before = logits(64, 50_000)
    after = before + 0.3 * logits(64, 50_000, 1.0, seed=1)
    kl, _ = divergences(rounded(before), after)
    exact, _ = divergences(before, after)
    ratio = before.double().log_softmax(-1) - after.double().log_softmax(-1)
    p = before.double().softmax(-1)
    deviation = ((p * ratio.square()).sum(-1) - (p * ratio).sum(-1).square()).sqrt()
    moment = second_moment(before)
    assert exact.mean() > 0.02
    bound = 1.01 * (2.0**-23 * moment + 2.0**-11 * moment.sqrt() * deviation)
    assert ((kl - exact).abs() <= bound).all()
    assert (kl.mean() - exact.mean()).abs() < 1e-5


@pytest.mark.parametrize("gap", [1e-7, 1e-3])
def test_the_most_likely_token_stays_so(gap):
    close = torch.full((2, 5), -0.5)
    close[0, 3], close[1, 1] = gap, gap
    close[:, 4] = 0.0
    assert rounded(close).argmax(-1).tolist() == [3, 1]


# The store


def test_what_is_recorded_comes_back(tmp_path):
    store = LogitStore(tmp_path, {"b/c": 2, "a": 3, "none": 0})
    kept = {(name, i): logits(40, 7, seed=i + 9 * (name == "a")) for name in "ax" for i in range(3)}
    for window in range(3):
        store.record("b/c", window, kept["x", window])
        assert not store.complete()
        store.record("none", window, kept["x", window])
        store.record("absent", window, kept["x", window])
    for window in range(3):
        assert not store.complete()
        store.record("a", window, kept["a", window])
    assert store.complete()
    again = LogitStore(tmp_path, {"a": 3, "none": 0, "b/c": 2})  # in whatever order
    for window in range(2):
        assert torch.equal(again.read("b/c", window), rounded(kept["x", window]))
    for window in range(3):
        assert torch.equal(again.read("a", window), rounded(kept["a", window]))
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(CheckpointError, match=r"original_logits_0\.npy cannot be read"):
        LogitStore(tmp_path / "elsewhere", {"a": 1}).read("a", 0)


def test_nothing_wanted_is_complete_and_writes_nothing(tmp_path):
    store = LogitStore(tmp_path, {"a": 0})
    store.record("a", 0, logits(3, 4))
    assert store.complete()
    assert Comparison(store).results() == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_file_that_is_cut_short_is_not_complete(size, tmp_path):
    store = LogitStore(tmp_path, {"a": 1})
    store.record("a", 0, logits(3, 4))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:size])
    assert not store.complete()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Comparison(store).add("a", 0, logits(3, 4))


def test_a_recording_that_stopped_midway_is_overwritten(tmp_path):
    store = LogitStore(tmp_path, {"a": 2})
    for window in (0, 0, 1):
        store.record("a", window, logits(3, 4, seed=window))
    assert store.complete()
    assert torch.equal(store.read("a", 1), rounded(logits(3, 4, seed=1)))
    for count in (1, 3):
        assert not LogitStore(tmp_path, {"a": count}).complete()
    store.record("a", 0, logits(3, 4, seed=5))
    assert not store.complete()


def test_a_disk_that_is_full_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("claq_exp.evaluation.divergence.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"original_logits_0.*: No space left on device"):
        LogitStore(tmp_path, {"a": 1}).record("a", 0, logits(3, 4))


# Two models


def corpus_windows(count: int, seqlen: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, seqlen), generator=torch.Generator().manual_seed(3))


def compared(before, after, corpora, wanted, folder, batch_size=2) -> dict[str, Divergence]:
    store = LogitStore(folder, wanted)
    comparison = Comparison(store)
    names = {name: CorpusConfig("unset") for name in corpora}
    evaluation = EvaluationConfig(names, batch_size=batch_size)
    for subject, model, on_logits in (
        ("before", before, store.record),
        ("after", after, comparison.add),
    ):
        scores = ScoreStore(folder / "scores", {"model": subject})
        measured = Subject(subject, "cpu", lambda model=model: model)
        meter = Meter(measured, 256, byte_tokenizer(), "cpu", scores, {}, on_logits=on_logits)
        meter.measure({name: Corpus(rows, "text") for name, rows in corpora.items()}, evaluation)
    return comparison.results()


def expected(before, after, windows: torch.Tensor) -> Divergence:
    with torch.inference_mode():
        p, q = (
            torch.cat([model(window[None]).logits[0, :-1] for window in windows]).double()
            for model in (before, after)
        )
    for leading, second in (*p.topk(2).values, *q.topk(2).values):
        assert leading - second > 1e-6  # by more than float32 rounds: batches agree on the first
    kl = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    same = (p.argmax(-1) == q.argmax(-1)).double()
    return Divergence(kl.mean().item(), same.mean().item(), len(kl))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 9])
def test_the_first_windows_of_two_models_are_compared(batch_size, tmp_path):
    before, after = tiny_llama(0).float(), tiny_llama(0).float()
    with torch.no_grad():
        for weight in after.parameters():
            weight.mul_(1.0 + 0.2 * torch.randn_like(weight))
    corpora = {
        "one": corpus_windows(5, 41),
        "two": corpus_windows(2, 9),
        "not": corpus_windows(1, 5),
    }
    wanted = {"one": 3, "two": 2, "not": 0}
    found = compared(before, after, corpora, wanted, tmp_path, batch_size)
    assert set(found) == {"one", "two"}
    for name, row in found.items():
        exact = expected(before, after, corpora[name][: wanted[name]])
        assert exact.mean > 0.001
        assert row.mean == pytest.approx(exact.mean, rel=1e-3, abs=1e-6)
        assert row.top1_agreement == pytest.approx(exact.top1_agreement)
        assert row.tokens == exact.tokens == wanted[name] * (corpora[name].shape[1] - 1)
    assert 0 < found["one"].top1_agreement < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_does_not_diverge_from_itself(dtype, tmp_path):
    model = tiny_llama().to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)  # predictions far from uniform
    corpora = {"one": corpus_windows(4, 33)}
    (row,) = compared(model, model, corpora, {"one": 4}, tmp_path).values()
    assert abs(row.mean) < 1e-5
    assert (row.top1_agreement, row.tokens) == (1.0, 4 * 32)


@pytest.mark.parametrize(("value", "written"), [(0.25, 0.25), (math.inf, None), (math.nan, None)])
def test_what_is_not_finite_is_null_in_the_results(value, written):
    rows = kl_rows({"words": Divergence(value, 0.5, 7)})
    assert rows == {"words": {"mean": written, "top1_agreement": 0.5, "tokens": 7}}
    json.dumps(rows, allow_nan=False)


@pytest.fixture
def run(tiny_run, tmp_path):
    def run(*words: str) -> tuple[Path, dict]:
        assert (
            main([*tiny_run, "experiment=rtn_4bit", "precision.bits=2", "threads=1", *words]) == 0
        )
        (path,) = (tmp_path / "outputs").rglob("results.json")
        return path.parent, json.loads(path.read_text())

    return run


def test_a_run_holds_the_divergence_of_its_checkpoint_from_the_model(
    run, tiny_model, text_file, capfd
):
    folder, results = run("evaluation.kl_windows=2")
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    after = claq_exp.load(folder / "checkpoint")
    text = text_file.read_text()[: 2 * 64]
    windows = torch.tensor(byte_tokenizer()(text).input_ids).reshape(2, 64)
    exact = expected(before, after, windows)
    row = results["kl"]["wikipedia"]
    assert exact.mean > 1e-4
    assert row["mean"] == pytest.approx(exact.mean, rel=1e-2)
    assert row["top1_agreement"] == pytest.approx(exact.top1_agreement)
    assert row["tokens"] == 2 * 63
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "kl"]
    assert (event["dataset"], event["value"]) == ("wikipedia", row["mean"])
    assert event["top1_agreement"] == row["top1_agreement"]
    assert not (folder / "work").exists()
    assert "KL from original, wikipedia (126" in capfd.readouterr().out


@pytest.mark.parametrize(("wanted", "tokens"), [("null", 6 * 63), ("8", 6 * 63), ("0", None)])
def test_all_windows_too_many_and_none(wanted, tokens, run, capfd):
    _, results = run(f"evaluation.kl_windows={wanted}")
    row = results["kl"].get("wikipedia")
    assert (row and row["tokens"]) == tokens
    assert ("KL from" in capfd.readouterr().out) == (tokens is not None)
