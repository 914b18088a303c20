"""Perplexity is what a slow float64 computation of its definition gives."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from claq_exp.cli import main
from claq_exp.config import CorpusConfig, EvaluationConfig
from claq_exp.evaluation.measure import Measurement, measure
from claq_exp.evaluation.perplexity import Perplexity, perplexity
from claq_exp.reporting.results import perplexity_rows

VOCABULARY = 11


class Table(nn.Module):
    """A language model whose logits depend on the last token alone."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, tokens: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.logits[tokens])


def table(seed: int = 0, scale: float = 1.0) -> Table:
    generator = torch.Generator().manual_seed(seed)
    return Table(scale * torch.randn(VOCABULARY, VOCABULARY, generator=generator))


def windows(count: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count, seqlen), generator=generator)


def slow(model: Table, tokens: torch.Tensor) -> float:
    """exp of the mean of -log p(token | token before), one token at a time in float64."""
    losses = []
    for window in tokens.tolist():
        for before, token in itertools.pairwise(window):
            logits = [float(value) for value in model.logits[before].double()]
            top = max(logits)
            total = math.fsum(math.exp(value - top) for value in logits)
            losses.append(top + math.log(total) - logits[token])
    return math.exp(math.fsum(losses) / len(losses))


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 5),
    seqlen=st.integers(2, 9),
    batch_size=st.integers(1, 7),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_it_equals_the_definition(count, seqlen, batch_size, scale):
    model, tokens = table(scale=scale), windows(count, seqlen)
    found = perplexity(model, tokens, batch_size, "cpu")
    exact = math.log(slow(model, tokens))  # in nats: losses of 100 keep 7 digits in float32
    assert math.log(found.value) == pytest.approx(exact, rel=1e-6, abs=1e-6)
    assert (found.seqlen, found.tokens) == (seqlen, count * (seqlen - 1))
    assert found.tokens_sha256 == hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def test_the_first_token_of_a_window_is_context_alone():
    model, tokens = table(), windows(1, 5)
    model.logits[:, tokens[0, 0]] = -50.0
    seen = [token for token in tokens[0, 1:].tolist() if token != tokens[0, 0]]
    assert len(seen) == 4
    assert perplexity(model, tokens, 1, "cpu").value == pytest.approx(slow(model, tokens), rel=1e-6)
    assert perplexity(model, tokens, 1, "cpu").value < math.exp(10)


def test_one_window_and_many_batch_sizes_agree_on_a_transformer():
    model = tiny_llama().float()
    tokens = torch.randint(0, 256, (7, 33), generator=torch.Generator().manual_seed(1))
    single = [perplexity(model, window[None], 1, "cpu").value for window in tokens]
    whole = math.exp(math.fsum(map(math.log, single)) / len(single))
    for batch_size in (1, 2, 3, 7, 50):
        assert perplexity(model, tokens, batch_size, "cpu").value == pytest.approx(whole, rel=1e-6)


def test_ticks_count_every_window_once():
    done: list[int] = []
    perplexity(table(), windows(7, 4), 3, "cpu", done.append)
    assert done == [3, 3, 1]


def test_beyond_float64_it_is_infinite():
    model, tokens = table(), torch.tensor([[0, 1, 2]])
    model.logits[:] = 0.0
    model.logits[0, 5] = model.logits[1, 5] = 5000.0
    assert perplexity(model, tokens, 1, "cpu").value == math.inf


def test_logits_that_are_nan_do_not_pass_for_an_infinite_perplexity():
    model = table()
    model.logits[3, 4] = math.nan
    assert math.isnan(perplexity(model, torch.tensor([[3, 1, 2]]), 1, "cpu").value)


def test_an_infinite_perplexity_is_null_in_the_results():
    measured = Measurement({"words": Perplexity(math.inf, 8, 7, "abc")})
    finite = Measurement({"words": Perplexity(2.0, 8, 7, "abc")})
    row = perplexity_rows(finite, measured)["words"]
    assert (row["original"], row["quantized"]) == (2.0, None)
    assert perplexity_rows(None, finite)["words"]["original"] is None


@pytest.mark.parametrize("value", [2.5, math.inf])
def test_a_measurement_comes_back_from_json(value):
    measured = Measurement({"words": Perplexity(value, 8, 7, "abc")})
    text = json.dumps(measured.to_json(), allow_nan=False)
    assert Measurement.from_json(json.loads(text)) == measured


def test_measure_reports_each_value_and_the_whole_share():
    model, tokenizer = table(), byte_tokenizer()
    corpora = {"one": windows(3, 5), "two": windows(2, 5, seed=1)}
    values, shares = [], []
    evaluation = EvaluationConfig(
        perplexity={name: CorpusConfig() for name in corpora}, batch_size=2
    )
    result = measure(
        model,
        tokenizer,
        corpora,
        evaluation,
        "cpu",
        on_value=lambda kind, name, value: values.append((kind, name, value)),
        on_share=lambda share, name: shares.append(share),
    )
    assert values == [
        ("perplexity", name, result.perplexity[name].value) for name in ("one", "two")
    ]
    assert sum(shares) == pytest.approx(1.0)


def test_a_run_whose_perplexity_overflows_finishes_with_null(
    tiny_run, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr("claq_exp.plan.matmul_speed", lambda device: 1e11)
    folder = tmp_path / "overflowing"
    model = tiny_llama(tie_word_embeddings=False)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"] / state["lm_head.weight"].abs().max() * 6e4
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    words = [f"model.source={folder}", "experiment=rtn_4bit", "threads=1"]
    assert main([*tiny_run, *words]) == 0
    (path,) = (tmp_path / "outputs").rglob("results.json")
    row = json.loads(path.read_text())["perplexity"]["wikipedia"]
    assert (row["original"], row["quantized"]) == (None, None)
