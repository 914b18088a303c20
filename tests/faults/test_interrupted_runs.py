"""A run that is killed, interrupted or out of disk goes on where it was, to the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from driven_runs import (
    CLOCK_BACKWARDS,
    DRIVER,
    FULL_EVENTS,
    KILL_AFTER_EVENT,
    KILL_AT_PUBLICATION,
    NO_RENAME,
    SLOW_GROUPS,
    Child,
    assert_at_most_a_block_repeated,
    assert_same_outcome,
    events,
    run_folder,
    send,
    tries,
    wait_for,
)
from safetensors.torch import load_file

from claq_exp.cli import main
from claq_exp.run_folder import RunState, run_state
from claq_exp.system.interruption import NOTICE
from claq_exp.tracking.events import read_events

LAYERS = 4


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "four"
    tiny_llama(num_hidden_layers=LAYERS).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def command(four_layers, text_file) -> Callable[[Path], list[str]]:
    return lambda outputs: [
        "model=hf",
        f"model.source={four_layers}",
        "calibration=text",
        f"calibration.path={text_file}",
        "calibration.windows=16",
        "calibration.seqlen=64",
        "evaluation=perplexity",
        f"evaluation.corpora.wikipedia.path={text_file}",
        "evaluation.corpora.wikipedia.windows=4",
        "evaluation.context=64",
        "tracking=none",
        "threads=1",
        f"outputs={outputs}",
    ]


@pytest.fixture(scope="module")
def first_outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("undisturbed") / "outputs"


@pytest.fixture(scope="module")
def driver(command, first_outputs) -> Iterator[subprocess.Popen]:
    """Runs in a folder of its own, without git and a home folder, in a narrow terminal."""
    folder = first_outputs.parent
    environment = {"PATH": "", "COLUMNS": "40", "OMP_NUM_THREADS": "1"}
    environment["CLAQ_EXP_CACHE"] = str(folder / "cache")
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    with (folder / "output.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            cwd=folder,
            text=True,
        )
    send(process, command(Path(first_outputs.name)))
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n", (folder / "output.log").read_text()
    yield process
    process.communicate()


@pytest.fixture(scope="module")
def undisturbed(driver, first_outputs) -> Path:
    """The folder of a run that nothing happened to."""
    return run_folder(first_outputs)


@pytest.fixture
def start(driver, tmp_path) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def begin(arguments: list[str], file_limit: int = 0, fault: str = "") -> Child:
        log = tmp_path / f"output-{len(children)}.log"
        order = {"arguments": arguments, "log": str(log), "file_limit": file_limit, "fault": fault}
        send(driver, order)
        children.append(Child(driver, log))
        return children[-1]

    yield begin
    for child in children:
        child.end()


def test_a_run_needs_no_git_no_home_no_wide_terminal_and_no_special_folder(undisturbed):
    results = json.loads((undisturbed / "results.json").read_text())
    assert results["status"] == "finished"
    assert results["run"]["git"] is None
    folder = undisturbed.parents[2]
    output = (folder / "output.log").read_text()
    table = [line for line in output.splitlines() if line[:1] in "│┃"]
    value = f"{results['perplexity']['wikipedia']['quantized']:.2f}"
    assert any(value in line for line in table)
    assert all(len(line) <= 40 for line in table)
    assert f"outputs/default/{undisturbed.name}/results.json" in output.splitlines()
    assert "\x1b" not in output
    assert sorted(path.name for path in folder.iterdir()) == ["cache", "output.log", "outputs"]


def kill_and_repeat(start, command, outputs: Path, kills: int, moment: random.Random) -> None:
    """Kill a run at random moments, `kills` times unless it is finished before, and finish it."""
    for _ in range(kills):
        child = start(command(outputs))
        done = sum(event["event"] == "layer" for event in events(outputs))
        wait_for(outputs, "layer", done + moment.randrange(1, 12))
        time.sleep(moment.uniform(0, 0.1))
        child.signal(signal.SIGKILL)
        if child.exit_code() == 0:
            break
    child = start(command(outputs))
    assert child.exit_code() == 0, child.output()


@pytest.mark.case(1, 13)
@pytest.mark.parametrize("seed", range(10))
def test_after_a_kill_at_any_moment_the_same_command_ends_in_the_same_bytes(
    seed, start, command, undisturbed, tmp_path
):
    moment = random.Random(seed)
    outputs = tmp_path / "outputs"
    child = start(command(outputs))
    wait_for(outputs, "layer", moment.randrange(1, 7 * LAYERS))
    time.sleep(moment.uniform(0, 0.03))
    child.signal(signal.SIGKILL)
    assert child.exit_code() == -signal.SIGKILL
    folder = run_folder(outputs)
    assert (folder / ".lock-holder").is_file()

    child = start(command(outputs))
    assert child.exit_code() == 0, child.output()
    assert_same_outcome(folder, undisturbed)
    assert_at_most_a_block_repeated(outputs)
    blocks = [event["block"] for event in events(outputs) if event["event"] == "block"]
    assert len(blocks) >= LAYERS - 1  # the kill may fall between a stored block and its event
    assert len(set(blocks)) == len(blocks)
    assert not (folder / ".lock-holder").exists()


@pytest.mark.case(1)
@pytest.mark.parametrize("seed", [10])
def test_after_ten_kills_in_a_row_the_same_command_ends_in_the_same_bytes(
    seed, start, command, undisturbed, tmp_path
):
    outputs = tmp_path / "outputs"
    kill_and_repeat(start, command, outputs, 10, random.Random(seed))
    assert_same_outcome(run_folder(outputs), undisturbed)
    assert_at_most_a_block_repeated(outputs)


@pytest.mark.case(2)
@pytest.mark.parametrize(
    ("number", "moment", "next_block"),
    [(1, "before", 0), (1, "after", 0), (4, "before", 1), (4, "after", 2), (5, "before", 2)],
)
def test_what_is_published_is_not_repeated_and_what_is_not_is(
    number, moment, next_block, start, command, undisturbed, tmp_path
):
    outputs = tmp_path / "outputs"
    fault = KILL_AT_PUBLICATION.format(number=number, moment=moment)
    assert start(command(outputs), fault=fault).exit_code() == -signal.SIGKILL
    child = start(command(outputs))
    assert child.exit_code() == 0, child.output()
    again = [event["block"] for event in tries(outputs)[-1] if event["event"] == "layer"]
    in_blocks = [block for block in range(next_block, LAYERS) for _ in range(7)]
    assert again == [*in_blocks, None]  # the embedding comes last
    assert_same_outcome(run_folder(outputs), undisturbed)


@pytest.mark.case(16)
@pytest.mark.parametrize(
    ("name", "value", "stages"),
    [
        ("stage", "embedding", ["load", "export", "evaluate quantized"]),
        ("stage", "export", ["load", "evaluate quantized"]),
    ],
    ids=["before export", "before evaluation"],
)
def test_only_the_rest_runs_after_all_blocks(
    name, value, stages, start, command, undisturbed, tmp_path
):
    outputs = tmp_path / "outputs"
    fault = KILL_AFTER_EVENT.format(name=name, value=value)
    assert start(command(outputs), fault=fault).exit_code() == -signal.SIGKILL
    child = start(command(outputs))
    assert child.exit_code() == 0, child.output()
    last = tries(outputs)[-1]
    assert "layer" not in {event["event"] for event in last}
    done = [event["stage"] for event in last if event["event"] == "stage"]
    assert [stage for stage in done if stage != "evaluate original"] == stages
    assert_same_outcome(run_folder(outputs), undisturbed)


@pytest.mark.case(150)
def test_trained_norms_are_in_the_checkpoint_after_any_kill(start, command, four_layers, tmp_path):
    """Killed before a block is trained, between that and the next block, and before the end."""

    def words(outputs: Path) -> list[str]:
        return [*command(outputs), "tune=norms", "tune.steps=8"]

    whole = tmp_path / "whole"
    assert start(words(whole)).exit_code() == 0
    faults = [
        KILL_AFTER_EVENT.format(name="layer", value="model.layers.0.mlp.down_proj"),
        KILL_AFTER_EVENT.format(name="tune", value="model.layers.1"),
        KILL_AT_PUBLICATION.format(number=1, moment="before"),
        KILL_AT_PUBLICATION.format(number=2, moment="after"),
        KILL_AFTER_EVENT.format(name="stage", value="export"),
    ]
    outputs = tmp_path / "outputs"
    for fault in faults:
        assert start(words(outputs), fault=fault).exit_code() == -signal.SIGKILL
    child = start(words(outputs))
    assert child.exit_code() == 0, child.output()
    assert_same_outcome(run_folder(outputs), run_folder(whole))
    found = load_file(run_folder(outputs) / "checkpoint" / "model.safetensors")
    source = load_file(four_layers / "model.safetensors")
    norms = [name for name in source if "layernorm" in name]
    assert len(norms) == 2 * LAYERS
    for name in norms:
        assert found[name].dtype == source[name].dtype
    assert any(not torch.equal(found[name], source[name]) for name in norms)
    assert torch.equal(found["model.norm.weight"], source["model.norm.weight"])


@pytest.mark.case(3)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_group_at_hand_be_published_and_tells_how_to_go_on(
    number, start, command, undisturbed, tmp_path
):
    outputs = tmp_path / "outputs"
    child = start(command(outputs))
    wait_for(outputs, "layer", 8)
    child.signal(number)
    assert child.exit_code() == 75
    output = child.output()
    assert "Traceback" not in output
    assert f"claq-exp: {NOTICE}" in output.splitlines()
    last = output.splitlines()[-1]
    assert last.startswith("claq-exp: interrupted; the same command goes on")
    assert f"claq-exp {' '.join(command(outputs))}" in last
    assert events(outputs)[-1]["event"] == "failed"
    assert run_state(run_folder(outputs)) == RunState("interrupted")

    child = start(command(outputs))
    assert child.exit_code() == 0, child.output()
    layers = [event["name"] for event in events(outputs) if event["event"] == "layer"]
    assert len(set(layers)) == len(layers) == 7 * LAYERS + 1  # nothing was done twice
    assert_same_outcome(run_folder(outputs), undisturbed)


@pytest.mark.case(4)
def test_a_second_signal_waits_for_nothing(start, command, undisturbed, tmp_path):
    outputs = tmp_path / "outputs"
    child = start(command(outputs), fault=SLOW_GROUPS)
    wait_for(outputs, "stage", 2)
    time.sleep(0.5)
    child.signal(signal.SIGINT)
    deadline = time.monotonic() + 30
    while NOTICE not in child.output() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.signal(signal.SIGINT)
    assert child.exit_code() == 75, child.output()
    assert not [event for event in events(outputs) if event["event"] == "layer"]
    assert run_state(run_folder(outputs)) == RunState("interrupted")
    assert start(command(outputs)).exit_code() == 0
    assert_same_outcome(run_folder(outputs), undisturbed)


@pytest.mark.case(12)
def test_a_second_process_on_the_same_run_stops_and_names_the_first(
    start, command, undisturbed, tmp_path, capfd
):
    outputs = tmp_path / "outputs"
    child = start(command(outputs))
    wait_for(outputs, "started", 1)
    child.signal(signal.SIGSTOP)
    try:
        assert main(command(outputs)) == 1
        error = capfd.readouterr().err
        assert "Traceback" not in error
        line = error.splitlines()[-1]
        assert f"{run_folder(outputs)} is in use by process {child.pid} on " in line
    finally:
        child.signal(signal.SIGCONT)
    assert child.exit_code() == 0, child.output()
    assert_same_outcome(run_folder(outputs), undisturbed)


@pytest.mark.case(5)
@pytest.mark.parametrize(
    ("file_limit", "file"),
    [(20_000, "original_logits_0.npy"), (150_000, "student_0000.safetensors")],
)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    file_limit, file, start, command, undisturbed, tmp_path
):
    outputs = tmp_path / "outputs"
    child = start(command(outputs), file_limit=file_limit)
    assert child.exit_code() == 1, child.output()
    output = child.output()
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert last.startswith("claq-exp: ")
    assert file in last

    child = start(command(outputs))
    assert child.exit_code() == 0, child.output()
    assert_same_outcome(run_folder(outputs), undisturbed)


@pytest.mark.case(6)
@pytest.mark.parametrize("size", [300, 2000, 5000])
def test_a_disk_that_is_full_for_events_stops_the_run_and_its_half_line_is_skipped(
    size, start, command, undisturbed, tmp_path
):
    outputs = tmp_path / "outputs"
    child = start(command(outputs), fault=FULL_EVENTS.format(bytes=size))
    assert child.exit_code() == 1, child.output()
    output = child.output()
    assert "Traceback" not in output
    assert output.splitlines()[-1].endswith("events.jsonl: No space left on device")
    log = run_folder(outputs) / "events.jsonl"
    assert not log.read_text().endswith("\n")
    assert start(command(outputs)).exit_code() == 0
    assert {name for name, _ in read_events(log)} >= {"started", "layer", "finished"}
    assert_same_outcome(run_folder(outputs), undisturbed)


@pytest.mark.case(7)
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("blocks/state.json", 1),
        ("blocks/state.json", 5),
        ("quantize_0001_00.safetensors", 1),
        ("student_0002.safetensors", 1),
        ("/checkpoint", 1),
        ("/results.json", 1),
    ],
)
def test_a_replacement_that_fails_leaves_what_was_there(
    name, number, start, command, undisturbed, tmp_path
):
    outputs = tmp_path / "outputs"
    child = start(command(outputs), fault=NO_RENAME.format(name=name, number=number))
    assert child.exit_code() == 1, child.output()
    output = child.output()
    assert "Traceback" not in output
    assert output.splitlines()[-1].endswith(f"{name}: Input/output error")
    assert start(command(outputs)).exit_code() == 0
    assert_same_outcome(run_folder(outputs), undisturbed)
    assert_at_most_a_block_repeated(outputs)


@pytest.mark.case(15)
def test_a_clock_that_goes_backwards_changes_no_result(start, command, undisturbed, tmp_path):
    outputs = tmp_path / "outputs"
    child = start(command(outputs), fault=CLOCK_BACKWARDS)
    assert child.exit_code() == 0, child.output()
    assert_same_outcome(run_folder(outputs), undisturbed)
    results = json.loads((run_folder(outputs) / "results.json").read_text())
    assert all(seconds >= 0 for seconds in results["timings"].values())
    assert results["run"]["seconds"] >= 0


@pytest.mark.case(14)
def test_a_folder_may_have_any_name_and_length(start, command, undisturbed, tmp_path):
    outputs = tmp_path / "with spaces, 'quotes' und Ümläute 模型" / ("long" * 30) / ("name" * 30)
    words = command(outputs)
    words[-1] = "outputs=" + json.dumps(str(outputs), ensure_ascii=False)
    child = start(words)
    assert child.exit_code() == 0, child.output()
    assert_same_outcome(run_folder(outputs), undisturbed)


@pytest.mark.case(14)
@pytest.mark.parametrize("place", ["a file", "/proc/outputs"])
def test_outputs_where_no_folder_can_be_are_one_line(place, start, command, tmp_path):
    (tmp_path / "a file").write_text("no folder")
    outputs = tmp_path / place  # an absolute place stays as it is
    words = [*command(outputs)[:-1], f"outputs='{outputs}'", "check_resources=false"]
    child = start(words)
    assert child.exit_code() == 1, child.output()
    (line,) = child.output().splitlines()
    assert line.startswith(f"claq-exp: {outputs}")
