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
from transformers import PretrainedConfig

from claq_exp.cli import main
from claq_exp.config import CorpusConfig, EvaluationConfig
from claq_exp.evaluation.measure import Measurement, Meter
from claq_exp.evaluation.perplexity import Corpus, Perplexity, windows_at_once
from claq_exp.evaluation.perplexity import perplexity as corpus_perplexity
from claq_exp.evaluation.predict import Subject, in_memory
from claq_exp.evaluation.scores import ScoreStore
from claq_exp.run.results import perplexity_rows

VOCABULARY = 11


class Table(nn.Module):
    """A language model whose logits depend on the last token alone."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.config = PretrainedConfig(vocab_size=VOCABULARY)
        self.passes = 0

    def forward(self, tokens: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        self.passes += len(tokens)
        return SimpleNamespace(logits=self.logits[tokens])


def table(seed: int = 0, scale: float = 1.0) -> Table:
    generator = torch.Generator().manual_seed(seed)
    return Table(scale * torch.randn(VOCABULARY, VOCABULARY, generator=generator))


def windows(count: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count, seqlen), generator=generator)


def perplexity(model: nn.Module, tokens: torch.Tensor, batch_size: int, *options) -> Perplexity:
    return corpus_perplexity(in_memory(model, "cpu"), Corpus(tokens, "text"), batch_size, *options)


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


@settings(max_examples=30)
@given(
    count=st.integers(1, 5),
    seqlen=st.integers(2, 9),
    batch_size=st.integers(1, 7),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_it_equals_the_definition(count, seqlen, batch_size, scale):
    model, tokens = table(scale=scale), windows(count, seqlen)
    found = perplexity(model, tokens, batch_size)
    exact = math.log(slow(model, tokens))  # in nats: losses of 100 keep 7 digits in float32
    assert math.log(found.value) == pytest.approx(exact, rel=1e-6, abs=1e-6)
    assert (found.seqlen, found.tokens) == (seqlen, count * (seqlen - 1))
    assert found.tokens_sha256 == hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def test_the_first_token_of_a_window_is_context_alone():
    model, tokens = table(), windows(1, 5)
    model.logits[:, tokens[0, 0]] = -50.0
    seen = [token for token in tokens[0, 1:].tolist() if token != tokens[0, 0]]
    assert len(seen) == 4
    assert perplexity(model, tokens, 1).value == pytest.approx(slow(model, tokens), rel=1e-6)
    assert perplexity(model, tokens, 1).value < math.exp(10)


def test_one_window_and_many_batch_sizes_agree_on_a_transformer():
    model = tiny_llama().float()
    tokens = torch.randint(0, 256, (7, 33), generator=torch.Generator().manual_seed(1))
    single = [perplexity(model, window[None], 1).value for window in tokens]
    whole = math.exp(math.fsum(map(math.log, single)) / len(single))
    for batch_size in (1, 2, 3, 7, 50):
        assert perplexity(model, tokens, batch_size).value == pytest.approx(whole, rel=1e-6)


def test_ticks_count_every_window_once():
    done: list[int] = []
    perplexity(table(), windows(7, 4), 3, done.append)
    assert done == [3, 3, 1]


@pytest.mark.case(92)
def test_beyond_float64_it_is_infinite():
    model, tokens = table(), torch.tensor([[0, 1, 2]])
    model.logits[:] = 0.0
    model.logits[0, 5] = model.logits[1, 5] = 5000.0
    assert perplexity(model, tokens, 1).value == math.inf


def test_logits_that_are_nan_do_not_pass_for_an_infinite_perplexity():
    model = table()
    model.logits[3, 4] = math.nan
    assert math.isnan(perplexity(model, torch.tensor([[3, 1, 2]]), 1).value)


@pytest.mark.case(92, 97)
def test_an_infinite_perplexity_is_null_in_the_results():
    corpora = {"words": Corpus(windows(1, 8), "window", 0.25)}
    measured = Measurement({"words": Perplexity(math.inf, 8, 7, "abc")})
    finite = Measurement({"words": Perplexity(2.0, 8, 7, "abc")})
    row = perplexity_rows(corpora, finite, measured)["words"]
    assert (row["original"], row["quantized"]) == (2.0, None)
    assert (row["bos"], row["overlap"]) == ("window", 0.25)
    assert perplexity_rows(corpora, None, finite)["words"]["original"] is None


CORPORA = {"one": Corpus(windows(3, 5), "text"), "two": Corpus(windows(2, 5, seed=1), "text")}
EVALUATION = EvaluationConfig({name: CorpusConfig("unset") for name in CORPORA}, batch_size=2)


def meter(model: nn.Module, folder, **options) -> Meter:
    store = ScoreStore(folder, {"model": "table"})
    subject = Subject("quantized", "cpu", lambda: model)
    return Meter(subject, 256, byte_tokenizer(), "cpu", store, {}, **options)


def test_measure_reports_each_value_and_the_whole_share(tmp_path):
    values, shares = [], []
    result = meter(
        table(),
        tmp_path,
        on_value=lambda kind, name, value: values.append((kind, name, value)),
        on_share=lambda share, name: shares.append(share),
    ).measure(CORPORA, EVALUATION)
    assert values == [
        ("perplexity", name, result.perplexity[name].value) for name in ("one", "two")
    ]
    assert sum(shares) == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1.0, 1e6], ids=["finite", "infinite"])
def test_what_was_measured_is_found_again_without_the_model(scale, tmp_path):
    first = meter(table(scale=scale), tmp_path).measure(CORPORA, EVALUATION)
    assert math.isinf(first.perplexity["one"].value) == (scale > 1.0)
    values, shares, again = [], [], table()
    found = meter(
        again,
        tmp_path,
        on_value=lambda kind, name, value: values.append(name),
        on_share=lambda share, name: shares.append(share),
    ).measure(CORPORA, EVALUATION)
    assert found == first
    assert again.passes == 0
    assert values == ["one", "two"]
    assert sum(shares) == pytest.approx(1.0)


def test_logits_of_a_known_corpus_cost_only_their_own_windows(tmp_path):
    first = meter(table(), tmp_path).measure(CORPORA, EVALUATION)
    model, seen = table(), []
    found = meter(
        model,
        tmp_path,
        logit_windows={"one": 2},
        on_logits=lambda corpus, window, logits: seen.append((corpus, window, logits)),
    ).measure(CORPORA, EVALUATION)
    assert found == first
    assert model.passes == 2
    for number, (corpus, window, logits) in enumerate(seen):
        assert (corpus, window) == ("one", number)
        assert torch.equal(logits, model.logits[CORPORA["one"].windows[number, :-1]])


@pytest.mark.case(93)
@pytest.mark.parametrize(
    "other", [Corpus(windows(3, 5, seed=9), "text"), Corpus(windows(3, 5)[:2], "text")]
)
def test_other_tokens_are_measured_again(other, tmp_path):
    meter(table(), tmp_path).measure({"one": CORPORA["one"]}, EVALUATION)
    model = table()
    found = meter(model, tmp_path).measure({"one": other}, EVALUATION)
    assert model.passes == len(other.windows)
    assert found.perplexity["one"].tokens_sha256 == other.content()


def test_a_batch_takes_what_the_device_is_good_for():
    assert windows_at_once(7, 2048, 32_000, "cpu") == 7
    assert windows_at_once("auto", 512, 32_000, "cpu") == 4
    assert windows_at_once("auto", 2048, 32_000, "cpu") == 1
    assert windows_at_once("auto", 100_000, 32_000, "cpu") == 1


@pytest.mark.case(92)
def test_a_run_whose_perplexity_overflows_finishes_with_null(
    tiny_run, tiny_model, tmp_path, monkeypatch
):
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
