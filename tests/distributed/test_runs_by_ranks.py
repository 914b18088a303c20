"""Whole runs by several processes: what torchrun starts, what a kill costs, what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from processes import start_ranks

from claq_exp.cli import main
from claq_exp.run_folder import EVENTS_FILE
from claq_exp.tracking.events import read_events

pytestmark = pytest.mark.other_process


def run_folder(outputs: Path) -> Path:
    (folder,) = (outputs / "default").iterdir()
    return folder


def into(words: list[str], outputs: Path) -> list[str]:
    return [*words[:-1], "threads=1", f"outputs={outputs}"]


@pytest.fixture
def words(tiny_run, own_cache_of_scores) -> list[str]:
    return tiny_run


def test_torchrun_gives_what_one_process_gives(words, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(into(words, one)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "claq_exp", *into(words, two)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nominal bits per weight") == 1  # one process prints
    expected = json.loads((run_folder(one) / "results.json").read_text())
    results = json.loads((run_folder(two) / "results.json").read_text())
    assert results["run"]["hash"] == expected["run"]["hash"]
    assert results["run"]["processes"] == 2
    assert results["bits"] == expected["bits"]
    assert results["size"] == expected["size"]
    (row,), (other,) = results["perplexity"].values(), expected["perplexity"].values()
    assert row["original"] == other["original"]
    assert row["quantized"] == pytest.approx(other["quantized"], rel=0.01)
    assert_close_layers(run_folder(one), run_folder(two))


def assert_close_layers(first: Path, second: Path) -> None:
    one, other = (pandas.read_csv(folder / "layers.csv") for folder in (first, second))
    exact = ["block", "name", "rows", "cols", "bits", "tokens", "reserved"]
    pandas.testing.assert_frame_equal(one[exact], other[exact])
    errors = ["output_error", "weight_error"]
    pandas.testing.assert_frame_equal(one[errors], other[errors], rtol=0.02)


@pytest.mark.case(1)
@pytest.mark.parametrize("killed", [0, 1])
def test_a_run_goes_on_after_a_rank_was_killed(killed, words, tmp_path):
    outputs = tmp_path / "outputs"
    command = into(words, outputs)
    ranks = start_ranks(main, tmp_path / "ranks", command, size=2)
    ranks[0].wait_for(lambda: quantized_layers(outputs) >= 3)
    ranks[killed].signal(signal.SIGKILL)
    other = ranks[1 - killed]
    assert other.exit_code() == 1
    if killed == 1:
        assert "claq-exp: another process of this run has ended without a word" in other.output()
        assert "Traceback" not in other.output()
    else:
        assert other.output() == ""
    assert main(command) == 0  # with one process
    whole = tmp_path / "whole"
    assert main(into(words, whole)) == 0
    assert_close_layers(run_folder(outputs), run_folder(whole))


def quantized_layers(outputs: Path) -> int:
    events = list(outputs.glob(f"default/*/{EVENTS_FILE}"))
    return sum(name == "layer" for path in events for name, _ in read_events(path))


@pytest.mark.case(3)
@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)])
def test_a_signal_to_any_of_them_ends_all_after_the_group_at_hand(asked, words, tmp_path):
    outputs = tmp_path / "outputs"
    ranks = start_ranks(main, tmp_path / "ranks", into(words, outputs), size=2)
    ranks[0].wait_for(lambda: quantized_layers(outputs) >= 1)
    for rank in asked:
        ranks[rank].signal(signal.SIGTERM)
    assert [rank.exit_code() for rank in ranks] == [75, 75]
    assert "interrupted; the same command goes on" in ranks[0].output()
    assert ranks[1].output() == ""
    state = json.loads((run_folder(outputs) / "work" / "blocks" / "state.json").read_text())
    names = {part["name"] for part in state["parts"]}
    assert names  # what was solved is published


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["reservation.ratio=2"], "ratio"),
        (["evaluate", "checkpoint=nowhere"], "'evaluate' takes one process"),
        (["-m", "seed=1,2"], "a sweep takes one process"),
        (["device=cuda:1"], "device=cuda:1 is one for 2 processes"),
        (["model=hf", "model.source=/nowhere"], "/nowhere"),
    ],
)
def test_a_wrong_request_is_refused_once(command, message, tmp_path):
    first, second = start_ranks(main, tmp_path, command, size=2)
    assert first.exit_code() == 2
    assert message in first.output()
    assert first.output().count("\n") == 1
    assert (second.exit_code(), second.output()) == (2, "")


def test_cores_are_divided_among_the_processes_of_a_machine(monkeypatch):
    from claq_exp.system import machine

    chosen = []
    monkeypatch.setattr(machine.torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(machine, "cores", lambda: 8)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    machine.settle(0, None)
    machine.settle(0, 5)
    assert chosen == [2, 5]


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    from claq_exp.errors import ConfigError
    from claq_exp.system.machine import choose_device, torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}
    for name, value in {**place, "TORCHELASTIC_RUN_ID": "test"}.items():
        monkeypatch.setenv(name, str(value))
    assert choose_device("auto") == choose_device("cuda") == "cuda:1"
    assert choose_device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="this machine has 2 CUDA devices"):
        choose_device("auto")
