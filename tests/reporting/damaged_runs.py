"""A program that reports on two runs, after random damages of the files of one.

    python damaged_runs.py FOLDER OF TWO RUNS, WORKPLACE, ROUNDS

It writes a line of JSON for each damage.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from functools import partial
from pathlib import Path

import damages

from claq_exp.reporting.collect import collect
from claq_exp.reporting.compare import compare_runs
from claq_exp.reporting.page import write_page
from claq_exp.reporting.pictures import draw_report
from claq_exp.reporting.render import to_csv, to_latex, to_markdown
from claq_exp.reporting.report import TableOptions, make_table
from claq_exp.reporting.runs_table import unfinished_table
from claq_exp.run_folder import RunFolder
from claq_exp.tracking.events import EventLog

FILES = ("results.json", "state.json", "settings.json", "layers.csv", "events.jsonl")
PICTURES_EVERY = 45  # damages, for pictures take long


def report(folder: Path, whole: str, *, pictures: bool) -> str:
    """Do what `claq-exp report` does; the undamaged run must be in it."""
    collection = collect([folder])
    drawn = draw_report(collection.runs, folder) if pictures else []
    grid = make_table(collection, "title", TableOptions())
    unfinished = unfinished_table(collection)
    for table in (grid, *([unfinished] if unfinished else [])):
        for form in (to_markdown, to_csv, to_latex):
            form(table)
    write_page(folder / "report.html", "title", collection, [grid], drawn)
    return "reported" if whole in {run.name for run in collection.finished} else "lost"


def found_again(folder: Path) -> str:
    """Do what the same command does that finds its run finished."""
    results = RunFolder(folder, "").results()
    with EventLog(folder / "events.jsonl", []) as events:
        events.spent()
    return "found" if results else "none"


def compare(first: Path, second: Path) -> str:
    for grid in compare_runs(first, second):
        to_markdown(grid)
    return "compared"


def damage(path: Path, kind: str, dice: random.Random) -> None:
    if kind == "edit" and path.suffix == ".json":
        data = json.loads(path.read_text())
        damages.edit_json(data, dice)
        path.write_text(json.dumps(data))
    else:
        change = damages.BYTES.get(kind, damages.flip)
        path.write_bytes(change(path.read_bytes(), dice))


def main(originals: Path, place: Path, rounds: int) -> None:
    first, second = sorted(path.name for path in originals.iterdir())
    damaged = 0
    for name in FILES:
        edits = ["edit"] * 6 if name.endswith(".json") else []
        for number, kind in enumerate([*damages.BYTES, *edits]):
            for seed in range(rounds):
                damaged += 1
                folder = Path(shutil.copytree(originals, place / "damaged"))
                dice = random.Random(f"{name} {number} {seed}")
                damage(folder / first / name, kind, dice)
                pictures = damaged % PICTURES_EVERY == 0
                uses = {
                    "report": partial(report, folder, second, pictures=pictures),
                    "again": partial(found_again, folder / first),
                    "compare": partial(compare, folder / first, folder / second),
                }
                for use, call in uses.items():
                    found = damages.outcome(call)
                    case = {"file": name, "damage": kind, "seed": seed, "use": use}
                    damages.say(**case, outcome=found)
                shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
