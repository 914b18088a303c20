"""`benchmarks/gpu_check.py` in miniature, without the packages that it must not need."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from claq_exp.compose.experiment import compose_config

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
MODULES = ("common", "device_time", "tiny_model", "gpu_report", "gpu_check", "gpu_experiment")
NOT_NEEDED = (
    *("hydra", "lm_eval", "wandb", "datasets", "gguf", "sklearn", "scipy", "pyarrow", "pandas"),
    *("evaluate", "joblib", "submitit", "optuna", "ml_dtypes", "kmeans1d"),
)
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {NOT_NEEDED!r}
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
DEAF = """
import signal, subprocess, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
open({!r}, "w").write(str(subprocess.Popen(["sleep", "60"]).pid))
time.sleep(60)
"""
MEASURES = """
open({!r}, "w").write('{{"what": "copy", "bytes_per_s": 2e12}}\\n{{"cut": ')
"""
PARTS = ["limits", "tests", "experiment", "solve", "tune", "linear", "rounding"]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Path:
    """The folder of a whole check in miniature, where packages are missing."""
    folder = tmp_path_factory.mktemp("check")
    (folder / "without").mkdir()
    (folder / "without" / "sitecustomize.py").write_text(WITHOUT)
    path = os.pathsep.join([str(folder / "without"), str(ROOT)])
    words = ["--device", "cpu", "--quick", "--scale", "10", "--out", str(folder / "out")]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_check.py"), *words],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    logs = {log.name: log.read_text()[-2000:] for log in (folder / "out").glob("*.log")}
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    return folder / "out"


@pytest.fixture(scope="module")
def content(miniature) -> dict:
    return json.loads((miniature / "gpu_check.json").read_text())


def test_every_part_of_the_miniature_is_ok_and_its_figures_are_finite(content):
    assert [part["name"] for part in content["parts"]] == PARTS
    assert {part["verdict"] for part in content["parts"]} == {"ok"}
    for part in content["parts"]:
        assert part["figures"]
        for line in part["figures"]:
            numbers = [value for value in line.values() if isinstance(value, int | float)]
            assert numbers or line["what"] == "machine"
            assert all(math.isfinite(number) for number in numbers)


def test_the_page_names_machine_versions_verdicts_and_the_next_command(miniature, content):
    assert {"device", "driver", "torch", "triton", "transformers", "CUDA"} <= set(
        content["machine"]
    )
    page = (miniature / "gpu_check.md").read_text()
    assert all(f"| {part} | ok |" in page for part in PARTS)
    assert "bf16 / packed" in page and "share of the copy" in page and "x the limit" in page
    assert content["next"] in page
    assert "its figures mean nothing" in page


def test_tests_of_packages_that_are_not_there_are_left_out_and_counted(content):
    (tests,) = (part for part in content["parts"] if part["name"] == "tests")
    (counts,) = tests["figures"]
    assert counts["passed"] >= 1
    assert counts["left_out"] == 1
    assert counts["failed"] == 0
    assert "hydra" in tests["reason"]


def test_what_was_tuned_is_what_products_were_measured_with(miniature, content):
    tuned = json.loads((miniature / "tuning.json").read_text())
    figures = {part["name"]: part["figures"] for part in content["parts"]}
    assert {line["family"] for line in figures["tune"]} == {"joint", "lookups", "tiles"}
    for line in figures["tune"]:
        chosen = tuned[line["family"]][str(line["width"])][line["size"]]
        assert {f"chosen_{key}": value for key, value in chosen.items()}.items() <= line.items()
    (check,) = (line for line in figures["linear"] if line["what"] == "check")
    assert check["error"] < 1e-4


@pytest.fixture
def scripts(monkeypatch):
    """Import a script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


def asked(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(out=folder, device="cuda", quick=False, scale=1.0)


def test_a_part_that_fails_hangs_or_dies_stops_no_other(scripts, tmp_path, monkeypatch, capsys):
    check = scripts("gpu_check")
    monkeypatch.setattr(check, "GRACE", 0.3)
    child = tmp_path / "child"
    deaf = DEAF.format(str(child))
    figures = MEASURES.format(str(tmp_path / "works.jsonl"))
    plan = [
        check.Part("fails", 2, ["-c", "print('before'); raise SystemExit('boom')"]),
        check.Part("hangs", 1, ["-c", "import time; time.sleep(60)"]),
        check.Part("deaf", 2, ["-c", deaf]),
        check.Part("dies", 5, ["-c", "import os; os.kill(os.getpid(), 9)"]),
        check.Part("says nothing", 5, ["-c", "pass"]),
        check.Part("lacks", 5, ["-c", "pass"], needs=("no_such_module",)),
        check.Part("works", 5, ["-c", figures]),
    ]
    started = time.monotonic()
    outcomes = check.check(asked(tmp_path), plan)
    assert time.monotonic() - started < 15
    assert {outcome.name: outcome.verdict for outcome in outcomes} == {
        "fails": check.FAILED,
        "hangs": check.LATE,
        "deaf": check.LATE,
        "dies": check.FAILED,
        "says nothing": check.FAILED,
        "lacks": check.LEFT_OUT,
        "works": check.OK,
    }
    assert outcomes[0].reason == "boom"
    assert "no_such_module" in outcomes[5].reason
    assert outcomes[-1].figures == [{"what": "copy", "bytes_per_s": 2e12}]
    assert not Path("/proc", child.read_text()).exists() or _is_zombie(child.read_text())
    page = (tmp_path / "gpu_check.md").read_text()
    assert "| fails | FAILED |" in page and "boom" in page
    assert "--only fails hangs deaf dies says nothing --scale 3" in page


def _is_zombie(process: str) -> bool:
    return ") Z " in Path("/proc", process, "stat").read_text()


def test_reports_are_there_while_parts_are_missing(scripts, tmp_path):
    report = scripts("gpu_report")
    report.write_report(asked(tmp_path), [report.Outcome("limits", report.OK)], ["tests"])
    assert json.loads((tmp_path / "gpu_check.json").read_text())["not_run"] == ["tests"]
    assert "| tests | not run yet |" in (tmp_path / "gpu_check.md").read_text()


def test_a_failed_test_is_named(scripts, tmp_path):
    xml = (
        '<testsuites><testsuite><testcase classname="a" name="good"/>'
        '<testcase classname="a" name="bad"><failure message="No module named"/></testcase>'
        '<testcase classname="" name="b"><error message="m">No module named \'hydra\'</error>'
        "</testcase></testsuite></testsuites>"
    )
    (tmp_path / "tests.xml").write_text(xml)
    verdict, reason, (counts,) = scripts("gpu_check").judge_tests(tmp_path / "tests.xml")
    assert verdict == "FAILED"
    assert reason == "a::bad; left out for want of hydra"
    assert counts == {"passed": 1, "failed": 1, "skipped": 0, "left_out": 1}


def test_without_a_gpu_the_check_says_so_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--out", str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no CUDA device" in done.stderr


def test_all_parts_end_within_eight_minutes(scripts, tmp_path):
    words = argparse.Namespace(out=tmp_path, device="cuda", quick=False, model=None)
    check = scripts("gpu_check")
    plan = check.parts(words)
    assert [part.name for part in plan] == PARTS
    assert sum(part.seconds for part in plan) + 2 * check.GRACE < 480


def test_the_experiment_is_the_default_one(scripts, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("words")
    built = scripts("gpu_experiment").default_experiment(str(tmp_path), text, 64, 8)
    composed = compose_config(
        [
            *("model=hf", f"model.source={tmp_path}", "model.name=tiny", "model.dtype=float32"),
            *("calibration=text", f"calibration.path={text}", "calibration.windows=8"),
            *("calibration.seqlen=64", "calibration.batch_size=2", "evaluation=perplexity"),
            *("evaluation.context=64", "evaluation.kl_windows=2", "tracking=none"),
        ]
    )
    assert built.recipe() == composed.recipe()
    assert built.activation_rule() == composed.activation_rule()
    assert built.end_rules() == composed.end_rules()
    chosen = ("codebook", "precision", "reservation", "solver", "embedding", "activation")
    families = (*chosen, "evaluation")
    same = {family: getattr(built, family) for family in families}
    assert replace(composed, **same) == built


@pytest.mark.parametrize(("factor", "kept"), [(1.0, True), (1.04, True), (1.06, False)])
def test_results_beyond_a_limit_are_found(scripts, tmp_path, factor, kept, capsys):
    experiment = scripts("gpu_experiment")

    def found(name: str, error: float) -> object:
        (tmp_path / name).mkdir()
        (tmp_path / name / "layers.csv").write_text(f"name,output_error\na,{error}\nb,1.0\n")
        results = {
            "perplexity": {experiment.CORPUS: {"original": 5.0, "quantized": 6.0}},
            "bits": {"linear": 3.9},
            "fallbacks": {},
        }
        return experiment.Found(tmp_path / name, results, 1.0)

    words = argparse.Namespace(figures=tmp_path / "figures", device="cuda", kernels=1)
    pair = found("device", 2 * factor - 1), found("cpu", 1.0)
    variant = experiment.Variant({}, experiment.LIMITS)
    assert experiment.judge(words, "dense", variant, *pair) is kept
    assert ("OVER THE LIMIT: layer errors" in capsys.readouterr().out) is not kept
