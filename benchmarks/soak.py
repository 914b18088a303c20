"""Kills a sweep's processes at random, repeats its command until it is done, and compares.

A small sweep on a tiny random model runs once quietly.  Then the same sweep runs in other folders
while SIGKILL, SIGTERM and SIGINT fall on the sweep or on a job of it, and its command is given
again until it is done, for as many rounds as there is time.  In each round checkpoints must be the
same to the byte as in the quiet one, and so must all measures.

    python benchmarks/soak.py --minutes 3
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common import command_line, note, parse
from rich.console import Console
from rich.table import Table
from tiny_model import write_text, write_tiny_model

from claq_exp.errors import CheckpointError
from claq_exp.reporting.collect import Run, collect
from claq_exp.run_folder import RUNNING, STATE_FILE, run_state
from claq_exp.system.files import read_json
from claq_exp.system.interruption import EXIT_CODE

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MEASURED = ("bits", "size", "perplexity", "kl")  # what a kill must not change
SETTLED = {0, 1, EXIT_CODE, *(-number for number in SIGNALS)}


@dataclass
class Disturbances:
    """What falls on sweeps: until when and how often at most, and what has fallen."""

    chance: random.Random
    ends: float
    most: int
    signals: Counter[str] = field(default_factory=Counter)
    commands: int = 0

    @property
    def over(self) -> bool:
        """Whether nothing falls any more."""
        return time.monotonic() > self.ends or self.signals.total() >= self.most

    def __str__(self) -> str:
        told = ", ".join(f"{count} x {name}" for name, count in sorted(self.signals.items()))
        return f"{self.commands} commands; {told or 'no signals'}"


def main() -> int:
    """Print the table; return 1 where anything differs."""
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="in which signals fall")
    parser.add_argument("--signals", type=int, default=10_000, help="at most")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("overrides", nargs="*", help="of the sweep, in place of its own values")
    quick = {"signals": 1, "blocks": 2, "overrides": ["experiment=rtn_4bit", "seed=0,1"]}
    arguments = parse(parser, **quick)
    console = Console()
    console.print(f"seed {arguments.seed}", highlight=False)
    with tempfile.TemporaryDirectory(prefix="claq-soak-") as name:
        folder = Path(name)
        command = sweep_command(folder, arguments.blocks, arguments.overrides)
        quiet, rounds = folder / "quiet", []
        run_quietly([*command, f"outputs={quiet}"], quiet)
        ends = time.monotonic() + arguments.minutes * 60
        fell = Disturbances(random.Random(arguments.seed), ends, arguments.signals)
        while not rounds or not fell.over:
            outputs = folder / f"round-{len(rounds) + 1}"
            disturb([*command, f"outputs={outputs}"], outputs, fell)
            rounds.append(runs_below(outputs))
        table, alike = compare(runs_below(quiet), rounds)
    console.print(table)
    console.print(f"{len(rounds)} rounds, {fell}", highlight=False)
    note(arguments, rounds=len(rounds), commands=fell.commands, signals=fell.signals.total())
    return 0 if alike else 1


def sweep_command(folder: Path, blocks: int, overrides: list[str]) -> list[str]:
    """Write a random Llama and a text, and return the command of a sweep over them."""
    write_tiny_model(folder / "model", num_hidden_layers=blocks)
    text = folder / "words.txt"
    write_text(text)
    return [
        *(sys.executable, "-m", "claq_exp", "-m", "name=soak", "tracking=none", "threads=1"),
        *("model=hf", f"model.source={folder / 'model'}", "calibration=text"),
        *(f"calibration.path={text}", "calibration.windows=32", "calibration.seqlen=64"),
        *("evaluation=perplexity", f"evaluation.corpora.wikipedia.path={text}"),
        *("evaluation.corpora.wikipedia.windows=4", "evaluation.context=64"),
        *(overrides or ("precision.target_bits=2.5,3.5", "seed=0,1")),
    ]


def run_quietly(command: list[str], outputs: Path) -> None:
    """Run a command that must succeed.  Raises SystemExit with what it said where it does not."""
    done = subprocess.run(
        command, env=_environment(outputs), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the quiet sweep failed:\n{done.stdout}\n{done.stderr}")


def disturb(command: list[str], outputs: Path, fell: Disturbances) -> None:
    """Give a sweep's command until it is done, while signals fall on it and its jobs."""
    while True:
        fell.commands += 1
        quiet = fell.over
        log = outputs.with_name(f"command-{fell.commands}.log")
        with log.open("w") as output:
            sweep = subprocess.Popen(
                command, env=_environment(outputs), stdout=output, stderr=output
            )
        while sweep.poll() is None and not fell.over:
            strike(sweep, outputs, fell)
        code = sweep.wait()
        if code == 0:
            return
        if quiet or code not in SETTLED:
            raise SystemExit(f"the sweep ended with {code}:\n{log.read_text()}")


def strike(sweep: subprocess.Popen[bytes], outputs: Path, fell: Disturbances) -> None:
    """Wait until a job runs, and a little, and send a signal to it or to its sweep."""
    while not list(running_jobs(outputs)) and sweep.poll() is None:
        time.sleep(0.1)
    time.sleep(fell.chance.uniform(0.0, 2.0))
    number, on_sweep = fell.chance.choice(SIGNALS), fell.chance.random() < 0.5
    jobs = list(running_jobs(outputs))
    if sweep.poll() is None and (on_sweep or jobs):
        with contextlib.suppress(ProcessLookupError):
            os.kill(sweep.pid if on_sweep else jobs[0], number)
            fell.signals[f"{number.name} on a {'sweep' if on_sweep else 'job'}"] += 1


def running_jobs(outputs: Path) -> Iterator[int]:
    """Yield the processes of runs that are under way."""
    for path in outputs.glob(f"soak/*/{STATE_FILE}"):
        with contextlib.suppress(CheckpointError, KeyError, IndexError):
            state = run_state(path.parent)
            if state is not None and state.name == RUNNING:
                yield int(read_json(path)["process"].split()[1])


def runs_below(outputs: Path) -> dict[str, Run]:
    """Return name -> run of all finished runs of a sweep."""
    return {run.name: run for run in collect([outputs / "soak"]).finished}


def compare(quiet: dict[str, Run], rounds: list[dict[str, Run]]) -> tuple[Table, bool]:
    """Return a table of the quiet sweep and the others, and whether they are all alike."""
    table = Table("run", "linear bits", "perplexity", "after signals", "tries", "same bytes")
    alike = all(quiet.keys() == found.keys() for found in rounds)
    for name, run in quiet.items():
        others = [found.get(name) for found in rounds]
        same = all(other is not None and _same(run, other) for other in others)
        alike &= same
        values = ", ".join(sorted({first_perplexity(other) for other in others}))
        tries = ", ".join(str(count_tries(other)) for other in others if other is not None)
        bits = f"{run.measures['bits.linear'].quantized:.4f}"
        answer = "yes" if same else "NO"
        table.add_row(name[-8:], bits, first_perplexity(run), values, tries, answer)
    return table, alike


def _same(run: Run, other: Run) -> bool:
    return measures(run) == measures(other) and digest(run) == digest(other)


def measures(run: Run) -> dict[str, float | None]:
    """Return what a run measured that no clock and no machine has a part in."""
    return {
        key: measure.quantized for key, measure in run.measures.items() if measure.kind in MEASURED
    }


def digest(run: Run) -> str:
    """Return a hash of every byte of a run's checkpoint."""
    found = hashlib.sha256()
    assert run.folder is not None
    for path in sorted((run.folder / "checkpoint").iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def first_perplexity(run: Run | None) -> str:
    """Return it for a cell."""
    found = run.measures.values() if run else ()
    return next((f"{each.quantized:.6f}" for each in found if each.kind == "perplexity"), "missing")


def count_tries(run: Run) -> int:
    """Return how often a run was begun or gone on with."""
    assert run.folder is not None
    return (run.folder / "events.jsonl").read_text(errors="replace").count('"event": "started"')


def _environment(outputs: Path) -> dict[str, str]:
    """Both sweeps have a cache of their own, or the second would find what the first measured."""
    return {**os.environ, "CLAQ_EXP_CACHE": str(outputs / "cache")}


if __name__ == "__main__":
    sys.exit(main())
