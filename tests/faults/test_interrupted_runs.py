"""A run that is killed, interrupted or out of disk goes on where it was, to the same bytes."""

from __future__ import annotations

import contextlib
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
from conftest import byte_tokenizer, tiny_llama

from claq_exp.cli import main

LAYERS = 4

# Does one run, so that everything is imported and compiled, and then forks for each command.
DRIVER = """
import json, os, resource, signal, sys, traceback
import claq_exp.cli, claq_exp.plan
claq_exp.plan.matmul_speed = lambda device: 1e11
replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
print(claq_exp.cli.main(json.loads(sys.stdin.readline())), file=replies, flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if job["file_limit"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 99
        try:
            code = claq_exp.cli.main(job["arguments"])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(child, file=replies, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=replies, flush=True)
"""


class Child:
    """One command in a process of its own."""

    def __init__(self, driver: subprocess.Popen, log: Path) -> None:
        assert driver.stdout is not None
        self._stdout = driver.stdout
        self._log = log
        self._ended = False
        self.pid = int(self._stdout.readline())

    def signal(self, which: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, which)

    def exit_code(self) -> int:
        self._ended = True
        return int(self._stdout.readline())

    def end(self) -> None:
        """Leave nothing behind for the next test, whatever happened in this one."""
        if not self._ended:
            self.signal(signal.SIGKILL)
            self.exit_code()

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")


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

    def begin(arguments: list[str], file_limit: int = 0) -> Child:
        log = tmp_path / f"output-{len(children)}.log"
        send(driver, {"arguments": arguments, "log": str(log), "file_limit": file_limit})
        children.append(Child(driver, log))
        return children[-1]

    yield begin
    for child in children:
        child.end()


def send(driver: subprocess.Popen, message: object) -> None:
    assert driver.stdin is not None
    driver.stdin.write(json.dumps(message) + "\n")
    driver.stdin.flush()


def run_folder(outputs: Path) -> Path:
    (folder,) = (outputs / "default").iterdir()
    return folder


def events(outputs: Path) -> list[dict]:
    found = []
    for path in outputs.glob("default/*/events.jsonl"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def wait_for(outputs: Path, name: str, count: int) -> None:
    """Return when `count` events of a name are written, or the run is over."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        names = [event["event"] for event in events(outputs)]
        if names.count(name) >= count or "finished" in names:
            return
        time.sleep(0.002)
    raise TimeoutError(f"no {count} events '{name}' in {outputs}")


def content(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir())}


def assert_same_outcome(folder: Path, undisturbed: Path) -> None:
    assert content(folder / "checkpoint") == content(undisturbed / "checkpoint")
    ours, theirs = (
        json.loads((path / "results.json").read_text()) for path in (folder, undisturbed)
    )
    for key in ("bits", "size", "perplexity", "kl", "fallbacks"):
        assert ours[key] == theirs[key]
    assert not (folder / "work").exists()


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


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_after_a_kill_the_same_command_ends_in_the_same_bytes(
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
    finished = sum(event["event"] == "block" for event in events(outputs))

    child = start(command(outputs))
    assert child.exit_code() == 0, child.output()
    assert_same_outcome(folder, undisturbed)
    blocks = [event["block"] for event in events(outputs) if event["event"] == "block"]
    assert len(blocks) >= LAYERS - 1  # the kill may fall between a stored block and its event
    assert len(set(blocks)) == len(blocks)
    assert finished <= len(blocks)
    assert not (folder / ".lock-holder").exists()


def test_ctrl_c_tells_to_repeat_the_command_which_goes_on(start, command, undisturbed, tmp_path):
    outputs = tmp_path / "outputs"
    child = start(command(outputs))
    wait_for(outputs, "block", 2)
    child.signal(signal.SIGINT)
    assert child.exit_code() == 75
    output = child.output()
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert last.startswith("claq-exp: interrupted; the same command goes on")
    assert f"claq-exp {' '.join(command(outputs))}" in last
    assert events(outputs)[-1]["event"] == "failed"
    done = sum(event["event"] == "block" for event in events(outputs))
    assert done >= 2

    child = start(command(outputs))
    assert child.exit_code() == 0, child.output()
    blocks = [event["block"] for event in events(outputs) if event["event"] == "block"]
    assert blocks == list(range(LAYERS))
    assert_same_outcome(run_folder(outputs), undisturbed)


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


@pytest.mark.parametrize(
    ("file_limit", "file"),
    [(20_000, "original_logits_0.npy"), (150_000, "activations_0000.safetensors")],
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
