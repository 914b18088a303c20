"""Zero-shot accuracy is lm-eval's: the same as from our own log-likelihoods of its prompts."""

from __future__ import annotations

import json
import os
import random

import pytest
import torch
from conftest import WORDS, byte_tokenizer, tiny_llama

from claq_exp.config import TaskConfig
from claq_exp.errors import ConfigError, SourceError
from claq_exp.evaluation.zero_shot import score_tasks, stock_task, task_data


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
    path = tmp_path / "rows.jsonl"
    write(path, rows)
    return path


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def log_likelihood(model, tokenizer, prompt: str, target: str) -> float:
    start = tokenizer(prompt).input_ids
    whole = torch.tensor([tokenizer(prompt + target).input_ids])
    with torch.inference_mode():
        log_probability = model(whole).logits[0].double().log_softmax(-1)
    return sum(
        log_probability[place - 1, whole[0, place]].item()
        for place in range(len(start), whole.shape[1])
    )


def accuracies(model, tokenizer, rows) -> dict[str, float]:
    plain = normalised = 0
    for row in rows:
        prompt = f"Question: {row['goal']}\nAnswer:"
        answers = [row["sol1"], row["sol2"]]
        values = [log_likelihood(model, tokenizer, prompt, f" {answer}") for answer in answers]
        by_length = [value / len(text) for value, text in zip(values, answers, strict=True)]
        plain += values.index(max(values)) == row["label"]
        normalised += by_length.index(max(by_length)) == row["label"]
    return {"acc": plain / len(rows), "acc_norm": normalised / len(rows)}


def score(model, tokenizer, data, **options):
    task = TaskConfig(data=str(data), **options)
    return score_tasks(model, tokenizer, {"piqa": task}, 4)["piqa"]


def test_accuracies_equal_those_of_our_own_log_likelihoods(model, tokenizer, data, rows):
    expected = accuracies(model, tokenizer, rows)
    assert expected["acc"] != expected["acc_norm"]
    for metric in ("acc", "acc_norm"):
        found = score(model, tokenizer, data, metric=metric)
        assert found.value == pytest.approx(expected[metric])
        assert (found.metric, found.rows) == (metric, 12)
        variance = found.value * (1 - found.value) / 11
        assert found.stderr == pytest.approx(variance**0.5)


def test_only_the_first_rows_are_scored_where_fewer_are_asked_for(model, tokenizer, data, rows):
    found = score(model, tokenizer, data, rows=5)
    assert found.rows == 5
    assert found.value == pytest.approx(accuracies(model, tokenizer, rows[:5])["acc"])


@pytest.mark.parametrize("keep_time", [False, True], ids=["touched", "same time stamp"])
def test_edited_rows_are_not_served_stale(keep_time, model, tokenizer, data, rows):
    before = score(model, tokenizer, data).value
    stamp = data.stat()
    write(data, [{**row, "label": 1 - row["label"]} for row in rows])
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


@pytest.mark.parametrize("name", ["rows.txt", "rows.gz", "rows"])
def test_a_file_of_an_unknown_kind_names_the_known_ones(name, model, tokenizer, tmp_path):
    (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"\.arrow, \.jsonl, \.json, \.parquet"):
        score(model, tokenizer, tmp_path / name)


def test_a_missing_file_of_rows_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"zero_shot\.piqa\.data '.*nothing.jsonl' does not exist"
    ):
        task_data("piqa", TaskConfig(data=str(tmp_path / "nothing.jsonl")))
    assert task_data("piqa", TaskConfig()) is None


def test_the_stock_task_is_the_one_of_that_name():
    assert stock_task("piqa").name == "piqa.yaml"
    assert "task: arc_easy" in stock_task("arc_easy").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=r"lm-eval has no task 'piqaa'; similar: .*piqa"):
        stock_task("piqaa")
