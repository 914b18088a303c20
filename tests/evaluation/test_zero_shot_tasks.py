"""Zero-shot accuracy is lm-eval's: the same as from our own log-likelihoods of its prompts."""

from __future__ import annotations

import math
import os
import random
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import WORDS, byte_tokenizer, tiny_llama
from lm_eval.caching import cache as lm_eval_cache
from task_rows import made_rows, write_rows
from tiny_towers import TOWERS

from claq_exp.config import TaskConfig
from claq_exp.errors import ConfigError, SourceError
from claq_exp.evaluation.zero_shot import TaskScore, average_accuracy, score_tasks
from claq_exp.models.dispatch import loaded
from claq_exp.models.load import open_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=3).float()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Twelve questions, answers of different lengths, seven with the first one right."""
    generator = random.Random(5)

    def phrase(words: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(words))

    return [
        {
            "goal": phrase(4),
            "sol1": phrase(1 + i % 3),
            "sol2": phrase(1 + (i + 1) % 3),
            "label": int(i >= 7),
        }
        for i in range(12)
    ]


@pytest.fixture
def data(tmp_path, rows):
    return write_rows(tmp_path / "rows.jsonl", rows)


def log_likelihood(model, tokenizer, prompt: str, target: str) -> float:
    start = tokenizer(prompt).input_ids
    whole = torch.tensor([tokenizer(prompt + target).input_ids])
    with torch.inference_mode():
        log_probability = model(whole).logits[0].double().log_softmax(-1)
    return sum(
        log_probability[place - 1, whole[0, place]].item()
        for place in range(len(start), whole.shape[1])
    )


def best(values: list[float]) -> int:
    """The place of the largest, which leads by far more than batches and processors round."""
    second, first = sorted(values)[-2:]
    assert first - second > 1e-4
    return values.index(first)


def accuracies(model, tokenizer, rows) -> dict[str, float]:
    plain = normalised = 0
    for row in rows:
        prompt = f"Question: {row['goal']}\nAnswer:"
        answers = [row["sol1"], row["sol2"]]
        values = [log_likelihood(model, tokenizer, prompt, f" {answer}") for answer in answers]
        by_length = [value / len(text) for value, text in zip(values, answers, strict=True)]
        plain += best(values) == row["label"]
        normalised += best(by_length) == row["label"]
    return {"acc": plain / len(rows), "acc_norm": normalised / len(rows)}


def score(model, tokenizer, data, name="piqa", batch_size=4, **options):
    task = TaskConfig(data=str(data), **options)
    return score_tasks(model, tokenizer, {name: task}, batch_size)[name]


def test_accuracies_equal_those_of_our_own_log_likelihoods(model, tokenizer, data, rows):
    expected = accuracies(model, tokenizer, rows)
    assert expected["acc"] != expected["acc_norm"]
    for metric in ("acc", "acc_norm"):
        found = score(model, tokenizer, data, metric=metric)
        assert found.value == pytest.approx(expected[metric])
        assert (found.metric, found.rows) == (metric, 12)
        variance = found.value * (1 - found.value) / 11
        assert found.stderr == pytest.approx(variance**0.5)


@pytest.mark.case(116)
@pytest.mark.parametrize("kind", ["llava", "qwen2_audio"])
def test_a_model_of_several_towers_is_scored_as_a_causal_one(kind, tokenizer, data, rows):
    towers = TOWERS[kind].build(kind)
    assert score(towers, tokenizer, data).value == accuracies(towers, tokenizer, rows)["acc"]


def cleaned(text: str) -> str:
    """HellaSwag's marks of a WikiHow article, removed by lm-eval's rule."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def test_hellaswag_divides_by_the_characters_of_the_cleaned_ending(model, tokenizer, tmp_path):
    rows = made_rows("hellaswag", 12)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    plain = normalised = 0
    for row in rows:
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
        prompt = cleaned(f"{row['activity_label']}: {context}")
        endings = [cleaned(ending) for ending in row["endings"]]
        values = [log_likelihood(model, tokenizer, prompt, f" {ending}") for ending in endings]
        by_length = [value / len(text) for value, text in zip(values, endings, strict=True)]
        plain += best(values) == int(row["label"])
        normalised += best(by_length) == int(row["label"])
    found = score(model, tokenizer, data, "hellaswag", metric="acc_norm")
    assert plain != normalised
    assert found.value == pytest.approx(normalised / 12)
    assert found.metrics == pytest.approx({"acc": plain / 12, "acc_norm": normalised / 12})


def test_winogrande_scores_what_follows_the_blank_after_either_option(model, tokenizer, tmp_path):
    rows = made_rows("winogrande", 12)
    right = 0
    for row in rows:
        before, after = row["sentence"].split("_")
        values = [
            log_likelihood(model, tokenizer, before + row[option], f" {after.strip()}")
            for option in ("option1", "option2")
        ]
        right += best(values) == int(row["answer"]) - 1
    found = score(model, tokenizer, write_rows(tmp_path / "rows.jsonl", rows), "winogrande")
    assert 0 < right < 12
    assert found.value == pytest.approx(right / 12)


def test_word_perplexity_divides_by_the_words_of_the_article(model, tokenizer, tmp_path):
    """The text in windows of the model's context, each predicted from the token before it."""
    article = " = Cats = \n\n the cat sees a dog , and the dog runs . \n" * 3
    data = tmp_path / "wiki.test.raw"
    data.write_text(f" \n{article}", encoding="utf-8")
    pages = [f" = Cats = {part}" for part in article.split(" = Cats = ")[1:]]
    pages[:-1] = [page.removesuffix("\n") for page in pages[:-1]]
    total = words = 0
    for page in pages:
        text = page.replace(" , ", ", ").replace(" . ", ". ").replace(" \n", "\n")
        tokens = torch.tensor(
            [[tokenizer.eos_token_id, *tokenizer(text.replace("\n ", "\n")).input_ids]]
        )
        assert tokens.shape[1] < 128
        with torch.inference_mode():
            log_probability = model(tokens).logits[0].double().log_softmax(-1)
        total += log_probability[:-1].gather(1, tokens[0, 1:, None]).sum().item()
        words += len(re.split(r"\s+", page))
    found = score(model, tokenizer, data, "wikitext", metric="word_perplexity")
    assert found.rows == 3
    assert found.value == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert found.stderr is None
    assert set(found.metrics) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}


@pytest.mark.parametrize("name", ["piqa", "arc_easy", "hellaswag", "winogrande", "boolq"])
def test_the_batch_size_does_not_change_a_score(name, model, tokenizer, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", made_rows(name, 12))
    one, many, auto = (score(model, tokenizer, data, name, size) for size in (1, 7, "auto"))
    assert one.metrics == pytest.approx(many.metrics)
    assert one.metrics == pytest.approx(auto.metrics)
    assert one.requests_sha256 == many.requests_sha256 == auto.requests_sha256


def test_a_score_survives_the_way_through_json_data(model, tokenizer, data):
    found = score(model, tokenizer, data, rows=4)
    assert TaskScore(**asdict(found)) == found


def test_the_share_that_is_done_grows_to_one_over_all_tasks(model, tokenizer, data):
    shares: list[float] = []
    tasks = {
        "piqa": TaskConfig(data=str(data), rows=3),
        "winogrande": TaskConfig(
            data=str(write_rows(data.parent / "more.jsonl", made_rows("winogrande", 2)))
        ),
    }
    score_tasks(model, tokenizer, tasks, 4, shares.append)
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(1 / 12)
    assert 0.5 in shares
    assert shares[-1] == 1.0


def test_the_average_is_over_accuracies_alone():
    scores = {
        "a": TaskScore("acc", 0.5, None, 1),
        "b": TaskScore("acc_norm", 0.7, None, 1),
        "c": TaskScore("word_perplexity", 20.0, None, 1),
        "d": TaskScore("exact_match,strict-match", 0.3, None, 1),
    }
    assert average_accuracy(scores) == pytest.approx(0.5)
    assert average_accuracy({"a": scores["a"], "c": scores["c"]}) is None


def test_a_standard_error_without_a_formula_needs_no_other_process(
    model, tokenizer, tmp_path, monkeypatch
):
    def pool(*_):
        raise AssertionError("forked")

    monkeypatch.setattr("multiprocessing.Pool", pool)
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    rows = [{"text": f"the cat sees a {word}"} for word in WORDS]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    found = score(model, tokenizer, data, "lambada_openai", metric="perplexity")
    values = [log_likelihood(model, tokenizer, "the cat sees a", f" {word}") for word in WORDS]
    assert found.value == pytest.approx(math.exp(-sum(values) / len(values)), rel=1e-4)
    assert found.stderr > 0
    assert "DISABLE_MULTIPROC" not in os.environ


@pytest.mark.case(91)
def test_lm_eval_keeps_no_requests(model, tokenizer, data, tmp_path, monkeypatch):
    kept = Path(lm_eval_cache.PATH)
    before = sorted(kept.rglob("*")) if kept.exists() else []
    monkeypatch.setattr(lm_eval_cache, "PATH", str(tmp_path / "kept"))
    score(model, tokenizer, data, rows=2)
    assert not (tmp_path / "kept").exists()
    assert (sorted(kept.rglob("*")) if kept.exists() else []) == before


def test_only_the_first_rows_are_scored_where_fewer_are_asked_for(model, tokenizer, data, rows):
    found = score(model, tokenizer, data, rows=5)
    assert found.rows == 5
    assert found.value == pytest.approx(accuracies(model, tokenizer, rows[:5])["acc"])


@pytest.mark.case(91)
@pytest.mark.parametrize("keep_time", [False, True], ids=["touched", "same time stamp"])
def test_edited_rows_are_not_served_stale(keep_time, model, tokenizer, data, rows):
    before = score(model, tokenizer, data).value
    stamp = data.stat()
    write_rows(data, [{**row, "label": 1 - row["label"]} for row in rows])
    if keep_time:
        os.utime(data, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert before != 0.5
    assert score(model, tokenizer, data).value == pytest.approx(1 - before)


def test_an_unknown_metric_names_those_of_the_task(model, tokenizer, data):
    with pytest.raises(ConfigError, match="metric 'f1' is not one of: acc, acc_norm"):
        score(model, tokenizer, data, metric="f1")


@pytest.mark.parametrize(
    "content",
    ['{"goal": "cut\n', "", '{"goal": "a", "sol1": "b", "label": 0}\n'],
    ids=["broken", "empty", "field missing"],
)
def test_rows_that_cannot_be_used_are_one_line_with_the_file(content, model, tokenizer, data):
    data.write_text(content, encoding="utf-8")
    with pytest.raises(SourceError, match="piqa") as caught:
        score(model, tokenizer, data)
    assert str(data) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_lies_on_disk_answers_as_one_in_memory(tiny_model, tokenizer, data, tmp_path):
    opened = [open_model(tiny_model, tmp_path, dtype="float32", device="cpu") for _ in range(2)]
    spread = loaded(opened[0], "auto", {"cpu": 1})
    assert spread.device.type == "meta"
    assert score(spread, tokenizer, data) == score(opened[1].load(), tokenizer, data)
