"""Collects runs and makes tables and plots of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from claq_exp.checkpoint.files import read_json, write_bytes
from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.reporting.plots import plot_tradeoff
from claq_exp.reporting.results import SCHEMA
from claq_exp.reporting.tables import codebook_label, markdown, runs_frame, with_keys
from claq_exp.run_folder import RESULTS_FILE


@dataclass(frozen=True)
class Report:
    """The table and the files that a report left behind."""

    frame: pd.DataFrame
    files: list[Path]


def collect_runs(folder: Path) -> list[dict[str, Any]]:
    """Return the results of all finished runs below a folder, by linear bits.

    Raises ConfigError when there are none, CheckpointError for a newer schema.
    """
    if not folder.is_dir():
        raise ConfigError(f"report: '{folder}' is no folder")
    runs = [read_json(path) for path in sorted(folder.rglob(RESULTS_FILE))]
    for results in runs:
        if results.get("schema", 0) > SCHEMA:
            raise CheckpointError(
                f"{folder} holds results of schema {results['schema']}; update claq_exp"
            )
    finished = [results for results in runs if results.get("status") == "finished"]
    if not finished:
        raise ConfigError(f"report: no finished run below '{folder}'")
    return sorted(
        finished,
        key=lambda results: (results["config"]["model"]["name"], results["bits"]["linear"]),
    )


def make_report(folder: Path, keys: list[str]) -> Report:
    """Write report.md, report.csv and a plot per perplexity into the folder.

    keys: dotted config keys that become the first columns.  Raises ConfigError when runs were
    measured on different tokens under one name, for such numbers do not compare.
    """
    runs = collect_runs(folder)
    _check_same_tokens(runs)
    frame = runs_frame(runs)
    table = with_keys(frame, runs, keys)
    files = [folder / "report.md", folder / "report.csv"]
    write_bytes(files[0], (_originals(runs) + "\n" + markdown(table)).encode())
    write_bytes(files[1], table.to_csv(index=False).encode())
    frame["method"] = [_method(results["config"]) for results in runs]
    for measure in [column for column in frame.columns if column.endswith(" perplexity")]:
        rows = frame.dropna(subset=[measure])
        if len(rows) == 0 or rows["model"].nunique() > 1:
            continue
        corpus = measure.removesuffix(" perplexity")
        original = next(
            (run["perplexity"][corpus]["original"] for run in runs if corpus in run["perplexity"]),
            None,
        )
        files.append(folder / f"{corpus}_perplexity.png")
        plot_tradeoff(rows, measure, original, files[-1])
    return Report(table, files)


def _check_same_tokens(runs: list[dict[str, Any]]) -> None:
    """Refuse a column whose numbers do not compare: other tokens, other questions."""
    seen: dict[tuple[str, str], Any] = {}
    for results in runs:
        model = results["config"]["model"]["name"]
        tokens = {f"'{name}'": row["tokens_sha256"] for name, row in results["perplexity"].items()}
        compared = results.get("kl", {})  # of the same corpus' first tokens: their number tells
        tokens |= {f"the KL on '{name}'": row["tokens"] for name, row in compared.items()}
        tasks = results["zero_shot"].items()
        asked = {name: row.get("requests_sha256", row["rows"]) for name, row in tasks}
        for measure, content in tokens.items():
            if seen.setdefault((model, measure), content) != content:
                raise ConfigError(
                    f"report: runs of {model} measured {measure} on different tokens; put "
                    "them in separate folders"
                )
        for task, content in asked.items():
            if seen.setdefault((model, f"task {task}"), content) != content:
                raise ConfigError(
                    f"report: runs of {model} scored '{task}' on different questions (rows, "
                    "prompts or data); put them in separate folders"
                )


def _originals(runs: list[dict[str, Any]]) -> str:
    lines = {}
    for results in runs:
        model = results["config"]["model"]["name"]
        parts = [
            f"{name} perplexity {row['original']:.2f}"
            for name, row in results["perplexity"].items()
            if row["original"]
        ]
        parts += [
            f"{name} {row['metric']} {row['original']:.3f}"
            for name, row in results["zero_shot"].items()
            if row["original"] is not None
        ]
        lines[model] = f"Original {model}: {', '.join(parts) or 'not measured'}.\n"
    return "".join(lines.values())


def _method(config: dict[str, Any]) -> str:
    codebook, solver = codebook_label(config["codebook"]), config["solver"]["name"]
    parts = [codebook if solver != "nearest" else f"{codebook}, nearest"]
    precision, reservation = config["precision"]["name"], config["reservation"]["name"]
    if precision == "rate_distortion":
        return f"{parts[0]} + {precision}"
    if precision != "fixed":
        parts.append(f"AP {precision}")
    if reservation != "none":
        parts.append(f"OR {reservation} {config['reservation'].get('ratio', '')}".strip())
    return " + ".join(parts)
