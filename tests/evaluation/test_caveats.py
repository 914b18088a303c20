"""What makes a score worth less than it looks is counted, told, and refused by strict=true."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from conftest import byte_tokenizer, tiny_llama
from task_rows import made_rows, write_rows

from claq_exp.cli import main
from claq_exp.config import TaskConfig
from claq_exp.errors import ConfigError, NumericalError, SourceError
from claq_exp.evaluation import measure
from claq_exp.evaluation.caveats import caveats, refuse
from claq_exp.evaluation.tasks import load_task
from claq_exp.evaluation.zero_shot import score_tasks

CONTEXT = 128


@pytest.fixture(scope="module")
def model():
    return tiny_llama(max_position_embeddings=CONTEXT).float()


def score(model, name: str, rows: list[dict], tmp_path: Path, batch_size=4, **options):
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    task = TaskConfig(data=data, **options)
    return score_tasks(model, byte_tokenizer(), {name: task}, batch_size)[name]


def too_long(name: str, tmp_path: Path) -> list[int]:
    """How many bytes, which are tokens here, each request has beyond the context."""
    (leaf,) = load_task(name, TaskConfig(data=str(tmp_path / "rows.jsonl")))["tasks"].values()
    leaf.build_all_requests()
    lengths = [sum(len(text.encode()) for text in instance.args) for instance in leaf.instances]
    return [length - (CONTEXT + 1) for length in lengths if length > CONTEXT + 1]


def passages(*lengths: int) -> list[dict]:
    rows = made_rows("boolq", len(lengths))
    return [{**row, "passage": "p" * n} for row, n in zip(rows, lengths, strict=True)]


@pytest.mark.case(135)
@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_prompts_beyond_the_context_are_counted_with_their_tokens(batch_size, model, tmp_path):
    found = score(model, "boolq", passages(3, 90, 200, 400), tmp_path, batch_size)
    beyond = too_long("boolq", tmp_path)
    assert 0 < len(beyond) < 8
    assert found.requests == 8
    assert (found.cut_requests, found.cut_tokens) == (len(beyond), sum(beyond))


@pytest.mark.case(135)
def test_the_last_prompt_that_fits_is_not_cut(model, tmp_path):
    score(model, "boolq", passages(300), tmp_path)
    beyond = too_long("boolq", tmp_path)
    fitting = 300 - max(beyond)
    assert score(model, "boolq", passages(fitting), tmp_path).cut_requests == 0
    assert score(model, "boolq", passages(fitting + 1), tmp_path).cut_tokens == 1


@pytest.mark.case(135)
def test_answers_that_share_their_logits_are_counted_each(model, tmp_path):
    rows = [{"goal": "g" * 200, "sol1": "same a", "sol2": "same b", "label": 0}]
    found = score(model, "piqa", rows, tmp_path)
    assert (found.cut_requests, found.cut_tokens) == (2, sum(too_long("piqa", tmp_path)))


@pytest.mark.case(135)
def test_examples_that_do_not_fit_are_counted(model, tmp_path):
    rows = made_rows("winogrande", 4)
    shots = str(write_rows(tmp_path / "shots.jsonl", made_rows("winogrande", 30, seed=1)))
    assert score(model, "winogrande", rows, tmp_path).cut_requests == 0
    found = score(model, "winogrande", rows, tmp_path, shots=25, shots_data=shots)
    assert found.cut_requests == found.requests == 8


@pytest.mark.case(135)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_generation_cuts_the_prompt_for_the_room_that_its_answer_needs(batch_size, tmp_path):
    model = tiny_llama(max_position_embeddings=300).float()  # lm-eval generates 256 tokens
    rows = [{"question": "q" * n, "answer": "so #### 1"} for n in (5, 60, 90)]
    found = score(model, "gsm8k", rows, tmp_path, batch_size, metric="exact_match,strict-match")
    lengths = [len("Question: \nAnswer:") + n for n in (5, 60, 90)]
    beyond = [length - (300 - 256) for length in lengths if length > 300 - 256]
    assert (found.requests, found.cut_requests, found.cut_tokens) == (3, 2, sum(beyond))


@pytest.mark.case(135)
def test_the_windows_of_a_long_article_are_no_cut(model, tmp_path):
    path = tmp_path / "articles.raw"
    path.write_text(f" = One = \n {'a cat runs ' * 60}\n", encoding="utf-8")
    task = TaskConfig(metric="word_perplexity", data=str(path))
    found = score_tasks(model, byte_tokenizer(), {"wikitext": task}, 1)["wikitext"]
    assert (found.requests, found.cut_requests) == (1, 0)
    assert math.isfinite(found.value)


@pytest.mark.case(135)
def test_an_answer_beyond_the_context_is_refused_by_its_row(model, tmp_path):
    rows = made_rows("piqa", 3)
    rows[1]["sol2"] = "s" * 150
    with pytest.raises(SourceError) as caught:
        score(model, "piqa", rows, tmp_path)
    said = "row 2 of piqa has an answer of 151 tokens, more than the model's context of 128"
    assert said in str(caught.value)


@pytest.mark.case(135)
def test_a_generated_answer_needs_a_token_that_ends_it(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    rows = [{"question": "who?", "answer": "so #### 1"}]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    task = TaskConfig(metric="exact_match,strict-match", data=data)
    model = tiny_llama(max_position_embeddings=300).float()
    with pytest.raises(SourceError, match="the tokenizer has no eos_token"):
        score_tasks(model, tokenizer, {"gsm8k": task}, 1)


@pytest.mark.case(136)
def test_answers_that_are_no_numbers_are_counted(tmp_path):
    model = tiny_llama(tie_word_embeddings=False).float()
    model.lm_head.weight.data[5] = math.nan
    found = score(model, "piqa", made_rows("piqa", 3), tmp_path)
    assert (found.without_score, found.requests) == (6, 6)
    whole = score(tiny_llama().float(), "piqa", made_rows("piqa", 3), tmp_path)
    assert whole.without_score == 0


@pytest.mark.case(136)
def test_rows_of_the_hub_without_an_answer_are_counted(model, monkeypatch):
    rows = made_rows("piqa", 4)
    rows[0]["label"] = rows[3]["label"] = -1
    splits = {split: datasets.Dataset.from_list(rows) for split in ("train", "validation")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(splits))
    found = score_tasks(model, byte_tokenizer(), {"piqa": TaskConfig()}, 4)["piqa"]
    assert (found.unanswered_rows, found.rows) == (2, 4)


TASK = {"rows": 4, "requests": 8, "cut_requests": 0, "cut_tokens": 0}


def results(task: dict | None = None, corpus: dict | None = None, kl: float | None = 0.1) -> dict:
    corpus = {"original": 9.5, "quantized": 10.0, **(corpus or {})}
    return {
        "perplexity": {"words": corpus},
        "kl": {"words": {"mean": kl}},
        "zero_shot": {"piqa": {**TASK, **(task or {})}},
        "evaluation": {"zero_shot": {"piqa": {"rows": 4}}},
    }


@pytest.mark.case(135, 136)
@pytest.mark.parametrize(
    ("found", "said", "error"),
    [
        (results(), None, None),
        (
            results({"cut_requests": 3, "cut_tokens": 1234}),
            "piqa: 3 of 8 requests were longer than the model's context and lost 1,234 tokens from "
            "their beginning; fewer shots, other rows or a model with a longer context help",
            ConfigError,
        ),
        (
            results({"without_score": 2}),
            "piqa: 2 of 8 requests have no score (NaN), and its metrics say little",
            NumericalError,
        ),
        (
            results({"unanswered_rows": 1}),
            "piqa: in 1 of 4 rows the right answer is none of the choices; they count as wrong",
            ConfigError,
        ),
        (results({"rows": 3}), "piqa has 3 rows, fewer than the 4 that are asked for", None),
        (
            results(corpus={"quantized": None}, kl=None),
            "the perplexity of words is not finite, where the original's is 9.50",
            NumericalError,
        ),
        (
            results(corpus={"quantized": None, "original": None}),
            "the perplexity of words is not finite",
            None,
        ),
        (results(kl=None), "the KL divergence of words is not finite", NumericalError),
    ],
    ids=["none", "cut", "nan", "unanswered", "few", "infinite", "both infinite", "kl"],
)
def test_each_caveat_is_one_sentence_and_strict_refuses_what_costs_quality(found, said, error):
    told = caveats(found)
    assert [caveat.words for caveat in told] == ([said] if said else [])
    if error is None:
        refuse(told)
        return
    with pytest.raises(error) as caught:
        refuse(told)
    assert str(caught.value) == f"strict=true, and {said}"


def test_a_result_of_an_earlier_release_has_no_caveats():
    old = results()
    old["zero_shot"]["piqa"] = {"rows": 4}
    assert caveats(old) == caveats({}) == []


@pytest.fixture
def run(tiny_run, tmp_path):
    """A run with a task whose prompts are longer than the context of 128."""
    data = write_rows(tmp_path / "rows.jsonl", passages(3, 200))
    words = [*tiny_run, "experiment=rtn_4bit", "threads=1"]
    task = ["+evaluation.zero_shot.boolq.metric=acc", f"+evaluation.zero_shot.boolq.data={data}"]
    return lambda *more, cut=True: main([*words, *(task if cut else ()), *more])


def events_of(tmp_path: Path) -> list[dict]:
    (path,) = tmp_path.glob("outputs/default/*/events.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.case(135)
def test_a_run_tells_of_cut_prompts_in_results_events_and_below_its_table(run, tmp_path, capfd):
    assert run() == 0
    beyond = too_long("boolq", tmp_path)
    said = f"boolq: {len(beyond)} of 4 requests were longer than the model's context and lost"
    assert f"Note: {said}" in capfd.readouterr().out
    (path,) = tmp_path.glob("outputs/default/*/results.json")
    row = json.loads(path.read_text())["zero_shot"]["boolq"]
    assert (row["requests"], row["cut_requests"], row["cut_tokens"]) == (4, 2, sum(beyond))
    (event,) = [event for event in events_of(tmp_path) if event["event"] == "caveat"]
    assert (event["kind"], event["dataset"]) == ("cut", "boolq")
    assert event["words"].startswith(said)
    assert main(["report", str(tmp_path / "outputs"), "--into", str(tmp_path / "report")]) == 0
    assert said in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.case(135)
def test_strict_refuses_cut_prompts_before_anything_is_quantized(run, tmp_path, capfd):
    for _ in range(2):  # measured, then found
        assert run("strict=true", "calibration.windows=64") == 2
        said = "claq-exp: strict=true, and boolq: 2 of 4 requests were longer than"
        assert said in capfd.readouterr().err
    assert not [event for event in events_of(tmp_path) if event["event"] == "layer"]


@pytest.mark.case(136)
@pytest.mark.parametrize("strict", [False, True])
def test_a_perplexity_that_quantization_breaks_is_told(strict, run, tmp_path, monkeypatch, capfd):
    whole, seen = measure.perplexity, []

    def broken(*arguments):
        found = whole(*arguments)
        seen.append(found)
        return found if len(seen) == 1 else replace(found, value=math.inf)

    monkeypatch.setattr(measure, "perplexity", broken)
    words = ["calibration.windows=64", f"strict={str(strict).lower()}"]
    assert run(*words, cut=False) == int(strict)
    output = capfd.readouterr()
    said = f"perplexity of wikipedia is not finite, where the original's is {seen[0].value:.2f}"
    assert said in (output.err if strict else output.out)
    assert [event["dataset"] for event in events_of(tmp_path) if event["event"] == "caveat"] == [
        "wikipedia"
    ]
