"""A task on local rows asks and scores exactly what the stock task does on the same rows."""

from __future__ import annotations

import datasets
import lm_eval
import pytest
from conftest import byte_tokenizer, tiny_llama
from lm_eval.models.huggingface import HFLM
from task_rows import FILES, HUB, SPLITS, made_rows, real_rows, write_rows

from claq_exp.config import TaskConfig
from claq_exp.evaluation.definitions import all_tasks
from claq_exp.evaluation.tasks import load_task, task_content
from claq_exp.evaluation.zero_shot import score_tasks

ROWS = 8


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=3, max_position_embeddings=4096).float()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)  # slow


@pytest.fixture(params=["made", "real"])
def rows(request):
    """Rows of a task by name: ROWS to score and as many to draw examples from."""

    def of(name: str) -> tuple[list[dict], list[dict]]:
        if request.param == "made":
            return made_rows(name, ROWS), made_rows(name, ROWS, seed=1)
        found = real_rows(name, 2 * ROWS)
        if not found:
            pytest.skip(f"the real rows of {name} are not here")
        return found[:ROWS], found[ROWS:]

    return of


def hub_with(monkeypatch, name: str, scored: list[dict], examples: list[dict]) -> None:
    """Let `datasets` find these rows at the task's place of the hub, and nothing anywhere else."""
    splits = {"train": examples, "validation": examples} | {SPLITS[name]: scored}

    def load_dataset(path, name_=None, **options):
        assert (path, options.pop("name", name_)) == HUB[name]
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def stock(model, tokenizer, name: str, shots: int) -> tuple[dict, list[tuple]]:
    """lm-eval's own results of the untouched task, and the requests that it made."""
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[name],
        num_fewshot=shots,
        task_manager=all_tasks(),
    )
    asked = [
        argument
        for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        for argument in sample["arguments"]
    ]
    return found["results"][name], asked


def local(tmp_path, scored, examples, shots: int) -> TaskConfig:
    return TaskConfig(
        data=str(write_rows(tmp_path / "scored.jsonl", scored)),
        shots=shots,
        shots_data=str(write_rows(tmp_path / "examples.jsonl", examples)) if shots else None,
    )


@pytest.mark.parametrize(
    ("name", "shots"),
    [*((name, 0) for name in FILES), ("piqa", 2), ("arc_easy", 2), ("winogrande", 1)],
)
def test_scores_and_requests_are_those_of_the_stock_task(
    name, shots, rows, model, tokenizer, tmp_path, monkeypatch
):
    scored, examples = rows(name)
    task = local(tmp_path, scored, examples, shots)
    found = score_tasks(model, tokenizer, {name: task}, 4)[name]

    hub_with(monkeypatch, name, scored, examples)
    expected, asked = stock(model, tokenizer, name, shots)
    from_hub = score_tasks(model, tokenizer, {name: TaskConfig(shots=shots)}, 4)[name]
    assert found.metrics == {
        key.removesuffix(",none"): value
        for key, value in expected.items()
        if key.endswith(",none") and "_stderr" not in key
    }
    assert found.stderr == expected["acc_stderr,none"]
    assert (found.rows, found.shots) == (ROWS, shots)
    assert found == from_hub
    assert asked == requests_of(name, task, monkeypatch)


def requests_of(name: str, task: TaskConfig, monkeypatch) -> list[tuple]:
    (leaf,) = load_task(name, task)["tasks"].values()
    leaf.build_all_requests()
    return [instance.args for instance in leaf.instances]


@pytest.mark.parametrize("name", ["piqa", "winogrande"])
def test_the_hash_of_the_requests_tells_what_was_asked(name, model, tokenizer, tmp_path):
    rows = made_rows(name, ROWS)
    swapped = [rows[1], rows[0], *rows[2:]]
    other_answer = [dict(row) for row in rows]
    key = "label" if name == "piqa" else "answer"
    other_answer[2][key] = {0: 1, 1: 0, "1": "2", "2": "1"}[rows[2][key]]
    hashes = {
        score_tasks(
            model,
            tokenizer,
            {name: TaskConfig(data=str(write_rows(tmp_path / "rows.jsonl", kind)), **options)},
            4,
        )[name].requests_sha256
        for kind, options in [
            (rows, {}),
            (swapped, {}),
            (other_answer, {}),
            (rows, {"rows": ROWS - 1}),
            (rows, {"shots": 1, "shots_data": str(write_rows(tmp_path / "more.jsonl", rows))}),
        ]
    }
    assert len(hashes) == 5


def test_a_hub_task_and_its_content_follow_the_rows_of_the_hub(monkeypatch):
    scored, examples = made_rows("piqa", ROWS), made_rows("piqa", ROWS, seed=1)
    other = made_rows("piqa", ROWS, seed=2)
    contents = []
    for rows, shown, options in [
        (scored, examples, {}),
        (other, examples, {}),
        (scored, other, {}),
        (scored, examples, {"shots": 2}),
        (scored, other, {"shots": 2}),
        (scored, examples, {"rows": 3}),
    ]:
        hub_with(monkeypatch, "piqa", rows, shown)
        contents.append(task_content("piqa", TaskConfig(**options)))
    assert contents[0] == contents[2]  # without shots, examples are not part of it
    assert len(set(contents)) == 5
