"""What `gpu_check.py` writes: one JSON for programs, one page of Markdown for people."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK, LEFT_OUT, FAILED, LATE = "ok", "left out", "FAILED", "OUT OF TIME"
TUNING = "claq_exp/runtime/kernels/tuning.json"


@dataclass
class Outcome:
    """What became of a part; figures are the lines that its script noted."""

    name: str
    verdict: str
    seconds: float = 0.0
    reason: str = ""
    figures: list[dict[str, Any]] = field(default_factory=list)

    def lines(self, **wanted: str) -> list[dict[str, Any]]:
        """Return the figures in which these words stand."""
        return [f for f in self.figures if all(f.get(k) == v for k, v in wanted.items())]


def write_report(asked: argparse.Namespace, outcomes: list[Outcome], left: list[str]) -> None:
    """Write `gpu_check.json` and `gpu_check.md`.  left: parts that did not run yet."""
    found = {outcome.name: outcome for outcome in outcomes}
    about = machine(found)
    following = next_command(asked, outcomes, left)
    content = {
        "quick": asked.quick,
        "machine": about,
        "parts": [asdict(outcome) for outcome in outcomes],
        "not_run": left,
        "next": following,
    }
    text = json.dumps(content, indent=1)
    (asked.out / "gpu_check.json").write_text(text + "\n", encoding="utf-8")
    page = "\n".join(markdown(asked, about, found, left, following))
    (asked.out / "gpu_check.md").write_text(page + "\n", encoding="utf-8")


def machine(found: dict[str, Outcome]) -> dict[str, Any]:
    """Return device and versions, which the first part has noted."""
    lines = found["limits"].lines(what="machine") if "limits" in found else []
    return {key: value for key, value in lines[0].items() if key != "what"} if lines else {}


def next_command(asked: argparse.Namespace, outcomes: list[Outcome], left: list[str]) -> str:
    """Return what to type next."""
    wrong = [outcome for outcome in outcomes if outcome.verdict in (FAILED, LATE)]
    if wrong:
        late = " --scale 3" if any(outcome.verdict == LATE for outcome in wrong) else ""
        names = " ".join(outcome.name for outcome in wrong)
        logs = " ".join(str(Path(asked.out.name) / f"{outcome.name}.log") for outcome in wrong)
        return f"tail -n 40 {logs}; python benchmarks/gpu_check.py --only {names}{late}"
    if left:
        return "wait: parts are missing"
    if asked.device == "cpu" or asked.quick:
        return "python benchmarks/gpu_check.py, on a machine with a GPU"
    if (asked.out / "tuning.json").is_file():
        return f"cp {asked.out / 'tuning.json'} {TUNING} && python benchmarks/gpu_linear.py"
    return "python benchmarks/gpu_solve.py --bits 2 --blocks 32"


def markdown(
    asked: argparse.Namespace,
    about: dict[str, Any],
    found: dict[str, Outcome],
    left: list[str],
    following: str,
) -> Iterable[str]:
    """Yield the lines of the page."""
    yield f"# GPU check: {about.get('device', 'no device')}"
    if asked.quick or asked.device == "cpu":
        yield "\nA miniature: it shows that the check works; its figures mean nothing."
    yield "\n" + ", ".join(f"{key} {value}" for key, value in about.items() if key != "device")
    yield from table(
        ("part", "verdict", "seconds", "remark"),
        [
            *((o.name, o.verdict, f"{o.seconds:.0f}", o.reason) for o in found.values()),
            *((name, "not run yet", "", "") for name in left),
        ],
    )
    for name, section in SECTIONS.items():
        if name in found and (lines := list(section(found[name]))):
            yield f"\n## {name[0].upper()}{name[1:]}"
            yield from lines
    yield f"\nNext: `{following}`"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    """Yield a Markdown table; nothing where there is no row."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    if cells:
        yield ""
        yield f"| {' | '.join(heads)} |"
        yield f"|{'|'.join([' --- '] * len(heads))}|"
        yield from (f"| {' | '.join(row)} |" for row in cells)


def _limits(outcome: Outcome) -> Iterable[str]:
    rows = [
        (f["what"], f"{1e-12 * f.get('bytes_per_s', 0.0):.3f} TB/s")
        if "bytes_per_s" in f
        else (f"product, {f['what']}", f"{1e-12 * f['operations_per_s']:.3g} TFLOP/s")
        for f in outcome.figures
        if f["what"] != "machine"
    ]
    return table(("what this device does at most", "measured"), rows)


def _tests(outcome: Outcome) -> Iterable[str]:
    rows = [[str(value) for value in counts.values()] for counts in outcome.figures]
    return table([key.replace("_", " ") for key in outcome.figures[0]] if rows else (), rows)


def _experiment(outcome: Outcome) -> Iterable[str]:
    rows = []
    for f in outcome.figures:
        off = [key.partition(",")[0] for key in f if key.endswith(", off by")]
        told = [f"{key} {f[f'{key}, off by']:.1e} ({f[f'{key}, limit']:g})" for key in off]
        seconds = f"{f['seconds']:.1f}, CPU {f['cpu_seconds']:.1f}"
        rows.append((f["variant"], OK if f["ok"] else "OVER", seconds, "; ".join(told)))
    return table(("variant", "verdict", "seconds", "off from the CPU (limit)"), rows)


def _solve(outcome: Outcome) -> Iterable[str]:
    checks = [f"{f['error_over_cpu']:.4f}" for f in outcome.lines(what="check")]
    rows = [
        (
            str(f["bits"]),
            f"{f['seconds']:.3f}",
            f"{f['model_seconds']:.0f}",
            f"{f['step_us']:.1f}",
            f"{f['times_the_limit']:.1f}",
            f"{f['peak_bytes'] / 2**30:.1f}",
            ", ".join(checks),
        )
        for f in outcome.lines(what="block")
    ]
    heads = ("bits", "s a block", "s for 32", "us a step", "x the limit", "GiB", "error / CPU")
    return table(heads, rows)


def _tune(outcome: Outcome) -> Iterable[str]:
    rows = [
        (
            f"{f['family']}, {f['width']} bits, {f['size']}",
            ", ".join(
                f"{key.removeprefix('chosen_')} {value}"
                for key, value in f.items()
                if key.startswith("chosen_")
            ),
            f"{f['us']:.1f}",
        )
        for f in outcome.lines(what="tuned")
    ]
    return table(("product", "fastest configuration", "us"), rows)


def _linear(outcome: Outcome) -> Iterable[str]:
    rows = [
        (
            f"{f['shape']}, {f['form']}",
            str(f["batch"]),
            f"{f['bf16_us']:.1f}",
            f"{f['packed_us']:.1f}",
            f"{f['over_bf16']:.2f}",
            f"{f['bandwidth_share']:.0%}",
            f"{f['operations_share']:.1%}",
        )
        for f in outcome.lines(what="product")
    ]
    heads = ("matrix", "tokens", "torch bf16, us", "packed, us", "bf16 / packed")
    return table((*heads, "share of the copy", "share of the bf16 product"), rows)


def _rounding(outcome: Outcome) -> Iterable[str]:
    rows = [
        (
            f["format"],
            f"{f['kernel_us']:.1f}",
            f"{f['bandwidth_share']:.0%}",
            f"{f['whole_us']:.1f}",
            f"{f['over_bf16_product']:.0%}",
        )
        for f in outcome.figures
    ]
    heads = ("format", "kernel, us", "share of the copy", "whole, us", "of a bf16 product")
    return table(heads, rows)


SECTIONS = {
    "limits": _limits,
    "tests": _tests,
    "experiment": _experiment,
    "solve": _solve,
    "tune": _tune,
    "linear": _linear,
    "rounding": _rounding,
}
