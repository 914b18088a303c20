"""What a person is told of an error of a library, and of one that nobody expected."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
from pathlib import Path

import pytest
import torch
import wandb
from hydra import compose

from claq_exp import cli
from claq_exp.cli import main
from claq_exp.cli.bugs import explain_bug
from claq_exp.compose.experiment import compose_config
from claq_exp.compose.options import PRIMARY, hydra_ready
from claq_exp.errors import ConfigError, telling_line


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def of_pydantic():
    wandb.Settings(run_tags=("x" * 70,))


def of_hydra():
    with hydra_ready():
        compose(PRIMARY, overrides=["hydra.mode=sometimes"])


def of_torch():
    stored = io.BytesIO()
    torch.save({"rule": Path("x")}, stored)
    stored.seek(0)
    torch.load(stored, weights_only=True)


def of_state_dict():
    torch.nn.Linear(2, 2).load_state_dict({"weight": torch.zeros(3, 3)})


def of_hub():
    raise OSError(
        "404 Client Error. (Request ID: Root=1-ab;cd)\n\nRepository Not Found for url: x."
    )


def of_datasets():
    try:
        raise ValueError("JSON parse error: Missing a comma")
    except ValueError as error:
        raise RuntimeError("An error occurred while generating the dataset") from error


def of_a_dict():
    return {}["blocks"]


def without_words():
    raise ArithmeticError


def with_one_line():
    raise ValueError("header too small")


SAID = {
    of_pydantic: r"1 validation error for Settings: run_tags: .*Tags must be between 1 and 64",
    of_hydra: r"Error merging override hydra.mode=sometimes: Invalid value 'sometimes'.*MULTIRUN",
    of_torch: r"WeightsUnpickler error: Unsupported global: .*Path",
    of_state_dict: r'Error\(s\) in loading state_dict for Linear: .*"bias"',
    of_hub: r"404 Client Error: Repository Not Found for url: x\.$",
    of_datasets: r"An error occurred while generating the dataset: JSON parse error: Missing",
    of_a_dict: r"KeyError: 'blocks'$",
    without_words: r"ArithmeticError\(\)$",
    with_one_line: r"header too small$",
}


@pytest.mark.case(141)
@pytest.mark.parametrize("fail", SAID, ids=lambda fail: fail.__name__)
def test_one_line_of_a_librarys_error_tells_what_is_wrong(fail):
    with pytest.raises(Exception) as caught:
        fail()
    line = telling_line(caught.value)
    assert re.match(SAID[fail], line), line
    assert "\n" not in line


@pytest.mark.case(141)
@pytest.mark.parametrize(
    ("word", "fragment"),
    [
        (f"tracking.tags=[good,{'x' * 65}]", "65 characters"),
        ('tracking.tags=[""]', "0 characters"),
        ("tracking.project=a/b", "holds /"),
        (f"tracking.project={'x' * 129}", "129 characters"),
        ("tracking.project=", "0 characters"),
        (f"tracking.group={'x' * 129}", "129 characters"),
    ],
    ids=lambda text: text[:24],
)
def test_what_weights_and_biases_refuses_is_refused_before_work(word, fragment):
    with pytest.raises(ConfigError, match=fragment):
        compose_config(["tracking=wandb", word])
    assert compose_config([f"tracking.tags=[{'x' * 64}]", f"tracking.group={'x' * 128}"])


@pytest.mark.case(141)
def test_the_limits_of_tags_and_projects_are_those_of_the_installed_wandb():
    wandb.Settings(run_tags=("x" * 64,), project="x" * 128)
    for wrong in ({"run_tags": ("x" * 65,)}, {"project": "x" * 129}, {"project": "a:b"}):
        with pytest.raises(Exception, match=r"64|128|cannot contain"):
            wandb.Settings(**wrong)


def broken(*arguments):
    raise RuntimeError("the planner is broken\nall over")


@pytest.mark.case(142)
def test_a_bug_says_what_where_and_what_to_report(monkeypatch, capfd, cache):
    monkeypatch.setattr("claq_exp.models.source.fetch_wheel_file", None)
    assert main(["plan", "seed=3"]) == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    first, second = error.splitlines()
    assert first.startswith("claq-exp: this is a bug: TypeError: 'NoneType' object is not callable")
    assert re.search(r"\(in .*claq_exp/models/source.py, line \d+, model_folder\)$", first)
    log = Path(re.search(r"attach (\S+) ", second)[1])
    assert log.is_relative_to(cache)
    text = log.read_text(encoding="utf-8")
    assert "command: claq-exp plan seed=3\n" in text
    assert "Traceback" in text
    versions = json.loads(re.search(r"^versions: (.*)$", text, re.MULTILINE)[1])
    assert versions["torch"] == importlib.metadata.version("torch")


@pytest.mark.case(142)
def test_debug_shows_the_traceback_and_is_no_override(monkeypatch, capfd):
    monkeypatch.setattr(cli, "_plan", broken)
    assert main(["plan", "--debug"]) == 1
    error = capfd.readouterr().err
    assert "Traceback" in error
    assert "RuntimeError: the planner is broken" in error
    assert main(["plan", "foo=1"]) == 1
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.case(142)
def test_an_error_in_a_persons_own_rule_is_no_bug_of_the_program(tmp_path, monkeypatch, capfd):
    (tmp_path / "my_dividing_rules.py").write_text(
        "import dataclasses\n\nfrom claq_exp.quantize.precision import Precision\n\n"
        "@dataclasses.dataclass(frozen=True)\nclass Rule(Precision):\n"
        "    def plan(self, statistics):\n        return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["plan", "precision.name=my_dividing_rules:Rule", "~precision.target_bits"]) == 1
    first, second = capfd.readouterr().err.splitlines()
    assert "ZeroDivisionError: division by zero" in first
    assert "my_dividing_rules.py, line 8, plan), which is no part of claq_exp" in first
    assert second.startswith("The traceback is in ")


@pytest.mark.case(142)
def test_a_module_of_ones_own_that_does_not_import_is_a_wrong_request(tmp_path, monkeypatch, capfd):
    (tmp_path / "my_broken_rules.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["plan", "precision.name=my_broken_rules:Rule"]) == 2
    assert "SyntaxError: " in capfd.readouterr().err


@pytest.mark.case(142)
@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes differ"), False),
    ],
    ids=lambda case: str(case)[:20],
)
def test_memory_that_ran_out_is_no_bug(error, memory, tmp_path, monkeypatch):
    assert explain_bug(error, "claq-exp").startswith("memory ran out") == memory
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(tmp_path / "taken"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert str(tmp_path / "claq-exp-") in explain_bug(error, "claq-exp")  # no cache: elsewhere
