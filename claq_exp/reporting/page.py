"""One self-contained HTML page of many runs: tables, pictures, settings, layers."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from claq_exp.reporting.canvas import Picture
from claq_exp.reporting.collect import Collection, Run
from claq_exp.reporting.labels import method_label
from claq_exp.reporting.render import to_html
from claq_exp.reporting.report_table import ReportTable
from claq_exp.reporting.settings import differing, flatten
from claq_exp.run_folder.layers import LAYER_FIELDS
from claq_exp.system.files import json_safe, write_bytes

SHARED = ("block", "name", "rows", "cols")  # of layers.csv: the same in most runs, stored once
NAMED = 12  # values of a setting that a hint names
HEADINGS = ("run", "state", "model", "method", "linear bits", "seconds", "reason")
NUMBERS = ("linear bits", "seconds")


def write_page(
    path: Path,
    title: str,
    collection: Collection,
    tables: list[ReportTable],
    pictures: list[Picture],
) -> None:
    """Write a page that needs no other file and no network, and may make no request at all.

    Every text is escaped, whatever a run is called; what is not finite shows as no value.
    """
    parts = Path(__file__).parent
    style = (parts / "page.css").read_text(encoding="utf-8")
    script = (parts / "page.js").read_text(encoding="utf-8")
    page = Template((parts / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        style=style,
        style_hash=_digest(style),
        script=script,
        script_hash=_digest(script),
        summary=html.escape(_summary(collection)),
        notes="\n".join(f'<p class="note">{html.escape(note)}</p>' for note in collection.notes),
        tables="\n".join(f'<div class="scroll">\n{to_html(table)}</div>' for table in tables),
        pictures=_gallery(pictures),
        runs=_runs_table(collection.runs),
        commands=_commands(collection.runs),
        data=_json(_data(collection.runs)),
    )
    write_bytes(path, page.encode("utf-8", errors="xmlcharrefreplace"))


def _digest(text: str) -> str:
    """Return what a content security policy calls this text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(data: Any) -> str:
    """Return JSON that no HTML parser takes for markup."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _summary(collection: Collection) -> str:
    states = Counter(run.state.name for run in collection.runs)
    count = len(collection.runs)
    told = ", ".join(f"{number} {state}" for state, number in states.most_common())
    return f"{count} run{'s' * (count != 1)}: {told}."


def _gallery(pictures: Sequence[Picture]) -> str:
    figures = []
    for picture in pictures:
        title = html.escape(picture.title)
        source = _data_address(picture.svg.read_text(encoding="utf-8"))
        figures.append(
            f'<figure><img alt="{title}" src="{source}">'
            f"<figcaption><span>{title}</span></figcaption></figure>"
        )
    return "\n".join(['<div class="gallery">', *figures, "</div>"]) if figures else "<p>None.</p>"


def _data_address(svg: str) -> str:
    """Return an address that holds the picture: as an image of its own, its names meet no others.

    Left out are comments, metadata and digits that no screen shows.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: _two_decimals(found[0]), svg)
    svg = re.sub(r">\s+<", "><", re.sub(r"\s+", " ", svg))
    svg = svg.replace("%", "%25").replace("'", "%27").replace('"', "'")
    return "data:image/svg+xml," + quote(svg, safe=" '/:=,;.-+()!*@?$[]|{}%")


def _two_decimals(text: str) -> str:
    return re.sub(r"(\d\.\d\d)\d+", r"\1", text)


def _runs_table(runs: Sequence[Run]) -> str:
    head = "".join(
        f'<th scope="col"{_number_class(name)}>{html.escape(name)}</th>' for name in HEADINGS
    )
    rows = []
    for number, run in enumerate(runs):
        costs = run.measures
        cells = [
            f'<td class="wide">{html.escape(run.name)}</td>',
            f'<td class="state state-{html.escape(run.state.name)}">'
            f"{html.escape(run.state.name)}</td>",
            f"<td>{html.escape(_model(run))}</td>",
            f'<td class="wide">{html.escape(_method(run))}</td>',
            _number_cell(costs["bits.linear"].quantized if costs else None, 2),
            _number_cell(costs["time.total"].quantized if costs else None, 0),
            f'<td class="wide">{html.escape(run.state.reason)}</td>',
        ]
        rows.append(f'<tr data-number="{number}">{"".join(cells)}</tr>')
    start = f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>'
    return "\n".join([start, *rows, "</tbody></table></div>"])


def _number_class(heading: str) -> str:
    return ' class="number"' if heading in NUMBERS else ""


def _number_cell(value: float | None, digits: int) -> str:
    if value is None:
        return '<td class="number"></td>'
    return f'<td class="number" data-value="{value!r}">{value:,.{digits}f}</td>'


def _model(run: Run) -> str:
    return str(run.config.get("model", {}).get("name", ""))


def _method(run: Run) -> str:
    return method_label(run.config) if run.results else ""


def _commands(runs: Sequence[Run]) -> str:
    """Return the commands, versions and devices of the finished runs, each once."""
    own = [run.results["run"] for run in runs if run.results]
    commands = Counter(str(made["command"]) for made in own if made.get("command"))
    parts = [
        f"<p>{count} finished run{'s' * (count != 1)} by</p><pre>{html.escape(command)}</pre>"
        for command, count in commands.items()
    ]
    devices = dict.fromkeys(str(made["device"]) for made in own if made.get("device"))
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        for made in own
        if made.get("versions")
    )
    parts += [f"<p>On {html.escape(device)}.</p>" for device in devices]
    parts += [f"<p>With {html.escape(version)}.</p>" for version in versions]
    return "\n".join(parts) or "<p>No run has finished.</p>"


def _data(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the script draws from.

    runs: of each run its facts, measures, config and layers.  shared: distinct lists of layers.
    differing: settings that differ -> their values.  Layers are stored column by column.
    """
    shared: dict[str, int] = {}
    entries = [_entry(run, shared) for run in runs]
    configured = [run for run in runs if run.config]
    flat = [flatten(run.config) for run in configured]
    values = {
        key: list(dict.fromkeys(str(own.get(key, "unset")) for own in flat))
        for key in differing(configured)
    }
    return {
        "runs": entries,
        "shared": [json.loads(text) for text in shared],
        "differing": {
            key: ", ".join([*found[:NAMED], *(["…"] if len(found) > NAMED else [])])
            for key, found in values.items()
        },
        "layerColumns": list(LAYER_FIELDS),
    }


def _entry(run: Run, shared: dict[str, int]) -> dict[str, Any]:
    return {
        "name": run.name,
        "facts": _facts(run),
        "measures": [
            [measure.label, *map(_short, (measure.original, measure.quantized, measure.stderr))]
            for measure in run.measures.values()
        ],
        "config": json_safe(run.config),
        "layers": _layers(run, shared),
    }


def _facts(run: Run) -> list[list[str]]:
    made = run.results["run"] if run.results else {}
    facts = {
        "state": run.state.name,
        "reason": run.state.reason,
        "method": _method(run),
        "folder": str(run.folder) if run.folder else "",
        "overrides": " ".join(run.overrides),
        **{key: made.get(key) for key in ("command", "started", "finished", "device", "git")},
    }
    return [[key, str(value)] for key, value in facts.items() if value]


def _layers(run: Run, shared: dict[str, int]) -> dict[str, Any] | None:
    """Return the columns of layers.csv, those that runs have in common by number."""
    rows = run.block_layers
    if not rows:
        return None
    columns = {
        key: [json_safe(row.get(key)) for row in rows] for key in LAYER_FIELDS if key in rows[0]
    }
    common = {key: columns.pop(key) for key in SHARED if key in columns}
    number = shared.setdefault(json.dumps(common), len(shared))
    return {"shared": number, "columns": columns}


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
