"""The folder of a run is found by everything that changes its results, and by nothing else."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from claq_exp.compose.experiment import compose_config
from claq_exp.errors import ClaqError
from claq_exp.run.inputs import fetch
from claq_exp.run_folder import RunFolder, run_identity, unfinished_run_differs
from claq_exp.system.files import write_json

WORDS = [
    "model=hf",
    "model.source=/some/model",
    "calibration=text",
    "calibration.path=/some/text.txt",
    "evaluation=perplexity",
    "tracking=none",
    "outputs=/some/outputs",
]


def folder_of(words: list[str], contents: dict[str, str] | None = None, version: str = "1.0"):
    config = compose_config(words)
    return RunFolder.of(config, run_identity(config, contents or {}, version))


def folder_with_inputs(words: list[str]) -> RunFolder:
    return folder_of(words, fetch(compose_config(words)).contents)


@pytest.fixture(scope="module")
def base() -> RunFolder:
    return folder_of(WORDS)


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def words(tiny_run, model, text_file, tmp_path) -> list[str]:
    text = shutil.copy(text_file, tmp_path / "text.txt")
    return [
        *tiny_run,
        f"model.source={model}",
        f"calibration.path={text}",
        f"evaluation.corpora.wikipedia.path={text}",
    ]


@pytest.mark.case(10)
@pytest.mark.parametrize(
    "change",
    [
        "precision.target_bits=3.25",
        "reservation.ratio=0.01",
        "solver.damping=0.02",
        "precision.threshold=12",
        "seed=1",
        "calibration.windows=7",
        "calibration.seqlen=32",
        "evaluation.corpora.wikipedia.windows=5",
        "evaluation.kl_windows=5",
        "evaluation.kl_windows=null",
        "~evaluation.corpora.wikipedia",
        "model.dtype=bfloat16",
        "device=cpu",
    ],
)
def test_what_changes_results_leads_to_another_folder(change, base):
    after = folder_of([*WORDS, change])
    assert after.hash != base.hash
    assert after.path != base.path


@pytest.mark.case(11)
@pytest.mark.parametrize(
    "change",
    [
        "tracking=wandb",
        "resume=never",
        "threads=1",
        "checkpoint=/some/where",
        "outputs=/another/place",
        "name=another",
    ],
)
def test_what_changes_no_result_leads_to_the_same_run(change, base):
    after = folder_of([*WORDS, change])
    assert after.hash == base.hash
    assert after.path.name == base.path.name


def test_outputs_and_name_say_where_the_folder_is():
    folder = folder_of([*WORDS, "outputs=/another/place", "name=mine"])
    assert folder.path.parent == Path("/another/place/mine")
    assert folder.path.name.endswith(folder.hash[:8])
    home = folder_of([*WORDS, "outputs='~/runs'"]).path
    assert home.is_relative_to(Path.home() / "runs")


@pytest.mark.case(10)
@pytest.mark.parametrize(
    "file", ["model/model.safetensors", "model/config.json", "model/tokenizer.json", "text.txt"]
)
def test_a_changed_byte_of_an_input_leads_to_another_folder(file, words, tmp_path):
    before = folder_with_inputs(words)
    path = tmp_path / file
    content = bytearray(path.read_bytes())
    place = content.rfind(b"1") if path.suffix == ".json" else len(content) - 1
    content[place] = ord("2")
    path.write_bytes(content)
    assert folder_with_inputs(words).hash != before.hash


def test_another_version_or_another_content_leads_to_another_folder(base):
    assert folder_of(WORDS, version="1.1").hash != base.hash
    assert folder_of(WORDS, {"calibration": "abc"}).hash != base.hash


@pytest.mark.case(12)
def test_a_held_folder_names_its_holder_and_is_free_afterwards(tmp_path):
    folder = RunFolder(tmp_path / "run", "0" * 64)
    with folder.locked():
        with (
            pytest.raises(ClaqError, match=r"is in use by process \d+ on .*; wait for it"),
            folder.locked(),
        ):
            pass
        with pytest.raises(ClaqError), folder.locked():
            pass
    with folder.locked():
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_who_waited_for_a_folder_and_who_comes_later_do_not_both_hold_it(tmp_path):
    folder = RunFolder(tmp_path / "run", "0" * 64)
    with folder.locked():
        waiting = os.open(folder.path / ".lock", os.O_RDWR)
    fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(ClaqError), folder.locked():
        pass
    os.close(waiting)
    with folder.locked():
        pass


@pytest.mark.case(13)
def test_a_lock_that_a_killed_process_left_is_no_obstacle(tmp_path):
    folder = RunFolder(tmp_path / "run", "0" * 64)
    folder.path.mkdir()
    (folder.path / ".lock").touch()
    (folder.path / ".lock-holder").write_text("process 1 on elsewhere")
    with folder.locked():
        assert "elsewhere" not in (folder.path / ".lock-holder").read_text()


def test_only_a_finished_run_has_results(tmp_path):
    folder = RunFolder(tmp_path, "0" * 64)
    assert folder.results() is None
    folder.write_results({"status": "failed"})
    assert folder.results() is None
    folder.write_results({"status": "finished", "schema": 1})
    assert folder.results() == {"status": "finished", "schema": 1}


def unfinished(folder: RunFolder, identity: dict) -> RunFolder:
    """Leave what a killed run leaves, as far as looking for runs is concerned."""
    folder.work.mkdir(parents=True)
    write_json(folder.path / "settings.json", {"command": "claq-exp", **identity})
    return folder


def identity_of(words: list[str], contents: dict[str, str] | None = None) -> dict:
    return run_identity(compose_config(words), contents or {"model": "abc"}, "1.0")


def near(words: list[str], place: Path, contents: dict[str, str] | None = None) -> str:
    words = [*words, f"outputs={place}"]
    identity = identity_of(words, contents)
    return unfinished_run_differs(RunFolder.of(compose_config(words), identity), identity)


@pytest.fixture
def left(tmp_path) -> RunFolder:
    """An unfinished run of the common request."""
    words = [*WORDS, f"outputs={tmp_path}"]
    identity = identity_of(words)
    return unfinished(RunFolder.of(compose_config(words), identity), identity)


@pytest.mark.case(10)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("precision.target_bits=2.5", "precision.target_bits is 3.5 in place of 2.5"),
        ("seed=1", "calibration.seed is 0 in place of 1, seed is 0 in place of 1"),
        ("calibration.windows=7", "calibration.windows is 128 in place of 7"),
        ("calibration.seqlen=32", "calibration.seqlen is 2048 in place of 32"),
        ("solver.act_order=false", "solver.act_order is True in place of False"),
        ("solver.damping=0.02", "solver.damping is 0.01 in place of 0.02"),
        ("model.dtype=bfloat16", "model.dtype is auto in place of bfloat16"),
        ("budget.bits=6", "budget.bits is null in place of 6.0"),
    ],
)
def test_what_differs_from_the_nearest_unfinished_run_is_told_by_name(change, told, left, tmp_path):
    assert near([*WORDS, change], tmp_path) == f"the nearest one is {left.path}, where {told}"


@pytest.mark.case(10)
def test_another_start_of_a_codebook_is_told_by_name(tmp_path):
    words = [*WORDS, "codebook=sklearn_kmeans", f"outputs={tmp_path}"]
    unfinished(RunFolder.of(compose_config(words), identity_of(words)), identity_of(words))
    told = near([*words, "codebook.seed=7"], tmp_path)
    assert told.endswith("where codebook.seed is 10 in place of 7")


@pytest.mark.case(10)
def test_touched_files_are_told_by_what_they_are(left, tmp_path):
    assert near(WORDS, tmp_path, {"model": "abd"}) == (
        f"the nearest one is {left.path}, where the content of model is another"
    )


def test_the_nearest_unfinished_run_is_that_with_the_fewest_differences(left, tmp_path):
    far = [*WORDS, f"outputs={tmp_path}", "seed=3", "calibration.windows=9"]
    unfinished(RunFolder.of(compose_config(far), identity_of(far)), identity_of(far))
    assert str(left.path) in near([*WORDS, "seed=1"], tmp_path)
    assert "seed is 3 in place of 4" in near([*far[:-2], "seed=4", far[-1]], tmp_path)


def test_a_run_of_another_model_a_finished_and_a_damaged_one_are_no_near_ones(left, tmp_path):
    assert not near([*WORDS, "model.source=/another/model"], tmp_path)
    (left.path / "settings.json").write_text("{")
    assert not near([*WORDS, "seed=1"], tmp_path)
    left.work.rmdir()
    assert not near([*WORDS, "seed=1"], tmp_path)


def test_many_differences_are_counted_and_not_listed(left, tmp_path):
    changes = [
        "reservation.ratio=0.01",
        "calibration.windows=7",
        "solver.damping=0.02",
        "calibration.seqlen=32",
    ]
    told = near([*WORDS, *changes, "model.dtype=float16", "device=cpu"], tmp_path)
    assert told.endswith(", and 2 more")
    assert told.count(" in place of ") == 4


def test_settings_that_came_later_leave_earlier_runs_their_folders(base):
    plain = run_identity(compose_config(WORDS), {}, "1.0")
    assert "allocation" not in plain["config"]
    assert "after" not in plain["config"]["evaluation"]
    assert folder_of([*WORDS, "allocation=none"]).hash == base.hash
    assert folder_of([*WORDS, "evaluation.after=[quantize]"]).hash != base.hash
    assert "asymmetric" not in plain["config"]["solver"]
    assert folder_of([*WORDS, "solver.asymmetric=0"]).hash == base.hash
    assert folder_of([*WORDS, "solver.asymmetric=0.0"]).hash == base.hash
    assert folder_of([*WORDS, "solver.asymmetric=0.5"]).hash != base.hash
    assert "gptq_asymmetric0.5" in folder_of([*WORDS, "solver.asymmetric=0.5"]).path.name
    assert run_identity(compose_config([*WORDS, "solver=nearest"]), {}, "1.0")
    assert folder_of([*WORDS, "embedding=kmeans"]).hash == base.hash
    head = run_identity(compose_config([*WORDS, "head=kmeans"]), {}, "1.0")["config"]["head"]
    assert set(head) == {"name", "bits", "solver", "lookup", "rows"}
    words = [*WORDS, "allocation=rate_distortion"]
    assert run_identity(compose_config(words), {}, "1.0")["config"]["allocation"]["target_bits"]
    assert folder_of([*words, "allocation.windows=2"]).hash != folder_of(words).hash
