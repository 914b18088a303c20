"""Prove on a GPU, with one command, that what this project does there works, and how fast it is.

    python benchmarks/gpu_check.py --out gpu_check

Each part is a process of its own with a limit; when one fails or hangs the rest goes on, and what
it did not use of its time is the next one's.  All parts together end within 8 minutes, on one GPU
and without a network.  `--out` then holds `gpu_check.md` and `gpu_check.json` (rewritten after
each part), the output of each part, and `tuning.json`, what was found of launch configurations.
Exits with 0 where every part is ok or was left out, 1 where one is not, 2 without a GPU.

The machine needs torch, triton, transformers and numpy with all that these bring, and these, which
can be carried as wheels: accelerate, llvmlite, matplotlib (with contourpy, cycler, fonttools,
kiwisolver, pillow, pyparsing, python-dateutil, six), numba, omegaconf (2.3 with
antlr4-python3-runtime), psutil and threadpoolctl; for the tests pytest (with iniconfig, pluggy),
for some of them hypothesis (with sortedcontainers).  Not hydra-core, lm-eval, wandb or datasets.
What a missing package is needed for is left out, and the report says so.

    TRITON_INTERPRET=1 python benchmarks/gpu_check.py --device cpu --quick --out gpu_check

goes the same way in miniature on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from common import command_line, device_option, parse
from gpu_report import FAILED, LATE, LEFT_OUT, OK, Outcome, write_report

ROOT = Path(__file__).parent.parent
GRACE = 5.0  # seconds between asking a process to end and ending it
NO_DEVICE = 2  # exit code
TESTS = ("tests/kernels", "tests/runtime")
QUICK_TESTS = (
    "tests/kernels/test_block_rounding.py::test_the_least_numbers_are_not_taken_for_zero",
    "tests/runtime/test_runtime_bench.py",
)
WORKERS = 4  # of pytest-xdist, where it is installed: most of the time goes into compiling


@dataclass(frozen=True)
class Part:
    """One part of the check.

    seconds: its share of the whole time.  command: behind the interpreter.  needs: modules that it
    cannot do without.
    """

    name: str
    seconds: float
    command: Sequence[str]
    needs: tuple[str, ...] = ()


def parts(asked: argparse.Namespace) -> list[Part]:
    """Return what is done, in order."""
    here, out = ROOT / "benchmarks", asked.out
    device = ["--device", asked.device, *(["--quick"] if asked.quick else [])]
    model = [] if asked.model is None else ["--model", str(asked.model)]

    def script(name: str, figures: str, *more: str) -> list[str]:
        own = [str(here / name), *device, "--figures", str(out / f"{figures}.jsonl")]
        return [*own, *more]

    tuning, trying = str(out / "tuning.json"), "0" if asked.quick else "55"
    tests = [str(ROOT / test) for test in (QUICK_TESTS if asked.quick else TESTS)]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    pytest += ["--continue-on-collection-errors", f"--junitxml={out / 'tests.xml'}", *tests]
    if not missing(("xdist",)) and not asked.quick:
        pytest += ["-p", "xdist", "-n", str(WORKERS), "--dist", "loadfile"]
    run = ("omegaconf", "numba", "accelerate", "matplotlib", "psutil", "rich")
    return [
        Part("limits", 20, script("gpu_limits.py", "limits")),
        Part("tests", 150, pytest, ("pytest", "numba")),
        Part("experiment", 100, script("gpu_experiment.py", "experiment", *model), run),
        Part("solve", 60, script("gpu_solve.py", "solve"), ("numba",)),
        Part("tune", 75, script("gpu_linear.py", "tune", "--tune", tuning, "--seconds", trying)),
        Part("linear", 35, script("gpu_linear.py", "linear", "--tuning", tuning)),
        Part("rounding", 25, script("gpu_rounding.py", "rounding"), ("numba",)),
    ]


def missing(names: Sequence[str]) -> list[str]:
    """Return the modules that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


class NoDeviceError(Exception):
    """There is nothing to check here."""


def run_part(part: Part, out: Path, limit: float) -> Outcome:
    """Run a part in a process of its own for `limit` seconds at most."""
    if lacking := missing(part.needs):
        return Outcome(part.name, LEFT_OUT, reason=f"not installed: {', '.join(lacking)}")
    started = time.monotonic()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"HF_HUB_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # others' may be broken
    environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(paths)}
    with (out / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        code = ended_within(process, max(limit - GRACE, 1.0))
    seconds = time.monotonic() - started
    figures = read_figures(out / f"{part.name}.jsonl")
    verdict, reason = (OK, "") if code == 0 else (FAILED, last_line(out / f"{part.name}.log"))
    if code == NO_DEVICE and part.name == "limits":
        raise NoDeviceError(reason)
    if part.name == "tests" and (out / "tests.xml").is_file():
        verdict, reason, figures = judge_tests(out / "tests.xml")
    if code is None:
        return Outcome(part.name, LATE, seconds, f"after {seconds:.0f} s: {reason}", figures)
    if verdict == OK and not figures:
        verdict, reason = FAILED, "it measured nothing"
    return Outcome(part.name, verdict, seconds, reason, figures)


def ended_within(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """Return a process's exit code, or None for one that takes longer and is ended.

    What it has started ends with it.  One that the driver holds, so that nothing ends it, is left.
    """
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        for number in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
                os.killpg(process.pid, number)
                process.wait(GRACE)
                break
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def read_figures(path: Path) -> list[dict[str, Any]]:
    """Return the lines that a script has left; the last may be cut."""
    figures = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            figures.append(json.loads(line))
        except ValueError:
            break
    return figures


def last_line(path: Path) -> str:
    """Return the last line of a log that says something."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")[:300]


def judge_tests(path: Path) -> tuple[str, str, list[dict[str, Any]]]:
    """Return (verdict, reason, counts) of pytest's report.

    A file that asks for a package that is not there is left out; every other error is a failure.
    """
    counts = dict.fromkeys(("passed", "failed", "skipped", "left_out"), 0)
    failures, lacking = [], set()
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        problems = [*case.findall("error"), *case.findall("failure")]
        text = " ".join(f"{problem.get('message')} {problem.text}" for problem in problems)
        if not problems:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
        elif case.find("error") is not None and "No module named '" in text:
            counts["left_out"] += 1
            lacking.add(text.partition("No module named '")[2].partition("'")[0])
        else:
            counts["failed"] += 1
            failures.append(f"{case.get('classname', '')}::{case.get('name', '')}")
    told = [f"left out for want of {', '.join(sorted(lacking))}"] if lacking else []
    if failures:
        return FAILED, "; ".join([", ".join(failures[:5]), *told]), [counts]
    return (OK if counts["passed"] else FAILED), "; ".join(told), [counts]


def read() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    device_option(parser)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder (gpu_check)")
    parser.add_argument("--model", type=Path, help="a small model's folder, for the experiment")
    parser.add_argument("--only", nargs="+", metavar="PART", help="limits and these parts")
    parser.add_argument("--scale", type=float, default=1.0, help="of all limits of time (1)")
    return parse(parser)


def check(asked: argparse.Namespace, plan: Sequence[Part]) -> list[Outcome]:
    """Run the parts in turn, and write both reports after each."""
    outcomes: list[Outcome] = []
    started, planned = time.monotonic(), 0.0
    for part in plan:
        planned += asked.scale * part.seconds
        limit = planned - (time.monotonic() - started)
        print(f"{part.name}: at most {limit:.0f} s ...", flush=True)
        outcome = run_part(part, asked.out, limit)
        outcomes.append(outcome)
        print(f"  {outcome.verdict}, {outcome.seconds:.0f} s {outcome.reason}", flush=True)
        left = [other.name for other in plan[len(outcomes) :]]
        write_report(asked, outcomes, left)
    return outcomes


def main() -> int:
    """Run all parts; return the exit code."""
    asked = read()
    asked.out = asked.out.resolve()
    asked.out.mkdir(parents=True, exist_ok=True)
    for old in [*asked.out.glob("*.jsonl"), *asked.out.glob("tests.xml")]:
        old.unlink()
    plan = parts(asked)
    if asked.only:
        plan = [part for part in plan if part.name in ("limits", *asked.only)]
    try:
        outcomes = check(asked, plan)
    except NoDeviceError as error:
        print(error, file=sys.stderr)
        return NO_DEVICE
    print((asked.out / "gpu_check.md").read_text(encoding="utf-8"))
    return int(any(outcome.verdict not in (OK, LEFT_OUT) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
