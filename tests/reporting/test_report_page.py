"""The page of a report is self-contained, safe whatever runs are called, and works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import headless
import pytest
from run_samples import result, write_runs, write_state

from claq_exp.reporting.collect import Run, collect
from claq_exp.reporting.page import write_page
from claq_exp.reporting.pictures import draw_report
from claq_exp.reporting.report_table import Cell, ReportTable, Row
from claq_exp.run_folder import RunState
from claq_exp.run_folder.jobs import Job, write_job
from claq_exp.run_folder.layers import LAYER_FIELDS

HOSTILE = "</script><b>\"'&$title ünï<img src=x onerror=alert(1)>"
in_browser = pytest.mark.skipif(headless.browser() is None, reason="no Chromium on this machine")


def write_layers(folder: Path, blocks: int = 3) -> None:
    lines = [",".join(LAYER_FIELDS)]
    for block in range(blocks):
        for number, name in enumerate(("self_attn.q_proj", "mlp.down_proj")):
            row = dict.fromkeys(LAYER_FIELDS, "1.5")
            row |= {"block": str(block), "name": f"model.layers.{block}.{name}", "rows": "48"}
            row["output_error"] = "" if block == 2 and number else f"0.0{block + 1}{number}7"
            lines.append(",".join(row[field] for field in LAYER_FIELDS))
    (folder / "layers.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table_of(runs: list[Run]) -> ReportTable:
    original = Row([Cell("original"), Cell("16.00", 16.0), Cell("20.0", 20.0)], original=True)
    values = [(run, 30.5 if place == 0 else 9.25) for place, run in enumerate(runs)]
    rows = [
        Row([Cell(run.name), Cell("2.00", 2.0 + place), Cell(f"{value}", value)], run=run.name)
        for place, (run, value) in enumerate(values)
    ]
    blank = Row([Cell("no value"), Cell("", mark="a"), Cell("")])
    columns = ["run", "linear bits", "perplexity"]
    return ReportTable(
        f"Table {HOSTILE}", columns, [False, True, True], [original, *rows, blank], ["a: why."]
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Two finished runs, a failed and a killed one, and a job that never had a folder."""
    folder = tmp_path_factory.mktemp("page")
    first = result({"run.command": f"claq-exp {HOSTILE}", "config.model.name": HOSTILE})
    second = result({"config.precision.target_bits": 3.5, "bits.linear": 4.25})
    second["perplexity"]["words"]["quantized"] = None
    write_runs(folder, first, second)
    for place in (folder / "name").iterdir():
        write_layers(place)
    (folder / "name" / "run-0").rename(folder / "name" / HOSTILE.replace("/", "_"))
    failed = {"state": "failed", "reason": f"ran out of {HOSTILE}"}
    write_state(folder / "name" / "failed-1", failed, result()["config"])
    write_state(folder / "name" / "killed-1", {"state": "running", "process": "process 1 on x"})
    job = Job(7, ("precision.target_bits=9",), RunState("failed", "at most 8"))
    write_job(folder / "name", job)
    collection = collect([folder])
    pictures = draw_report(collection.runs, folder)
    path = folder / "report.html"
    write_page(path, f"Report of {HOSTILE}", collection, [table_of(collection.finished)], pictures)
    again = folder / "again.html"
    write_page(again, f"Report of {HOSTILE}", collection, [table_of(collection.finished)], pictures)
    assert path.read_bytes() == again.read_bytes()
    return path


class Tags(HTMLParser):
    """Collects start tags and checks that all are closed."""

    VOID = ("meta", "img", "br", "hr", "input", "link")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(path: Path) -> Tags:
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    tags.close()
    return tags


def test_nothing_is_fetched_from_anywhere(page):
    tags = parsed(page)
    assert tags.open == []
    assert {tag for tag, _ in tags.found}.isdisjoint({"link", "iframe", "base", "b"})
    for tag, attributes in tags.found:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/svg+xml,")), (tag, value[:60])
    policy = next(a["content"] for _, a in tags.found if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def test_pictures_have_words_and_headings_have_scopes(page):
    tags = parsed(page)
    assert all(attributes.get("alt") for tag, attributes in tags.found if tag == "img")
    assert all(attributes.get("scope") for tag, attributes in tags.found if tag == "th")


def test_embedded_data_is_what_was_measured(page):
    text = page.read_text(encoding="utf-8")
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text)[0])
    by_state = {}
    for run in data["runs"]:
        by_state.setdefault(dict(run["facts"])["state"], []).append(run)
    assert {state: len(runs) for state, runs in by_state.items()} == {
        "finished": 2,
        "failed": 2,
        "killed": 1,
    }
    assert data["shared"] == [
        {
            "block": [0, 0, 1, 1, 2, 2],
            "name": [
                f"model.layers.{block}.{name}"
                for block in range(3)
                for name in ("self_attn.q_proj", "mlp.down_proj")
            ],
            "rows": [48] * 6,
            "cols": [1.5] * 6,
        }
    ]
    errors = by_state["finished"][0]["layers"]["columns"]["output_error"]
    assert errors == [0.0107, 0.0117, 0.0207, 0.0217, 0.0307, None]
    assert set(data["differing"]) >= {"model.name", "precision.target_bits"}
    second = next(
        run for run in data["runs"] if run["config"].get("precision", {}).get("target_bits") == 3.5
    )
    assert ["words perplexity", 20.0, None, None] in second["measures"]


@pytest.fixture
def opened(page):
    """The page in a browser, checked at the end: no error, no request that leaves it."""
    with headless.Page(page) as shown:
        yield shown
        assert shown.problems == []
        assert [url for url in shown.requests if not url.startswith(("file://", "data:"))] == []
        assert sum(url.startswith("file://") for url in shown.requests) == 1


def column(shown, number: int, table: str = "#tables table") -> list[str]:
    return shown.run(
        f"[...document.querySelectorAll({json.dumps(table + ' tbody tr')})]"
        f".filter(row => !row.hidden).map(row => row.cells[{number}].textContent)"
    )


@in_browser
def test_a_click_on_a_heading_sorts_with_the_original_on_top_and_blanks_last(opened):
    names = column(opened, 0)
    assert column(opened, 2) == ["20.0", "30.5", "9.25", ""]
    heading = "#tables thead tr:last-child th:nth-child(3)"
    opened.click(f"{heading} button")
    assert column(opened, 2) == ["20.0", "9.25", "30.5", ""]
    assert column(opened, 0) == [names[0], names[2], names[1], names[3]]
    assert opened.run(f"document.querySelector('{heading}').ariaSort") == "ascending"
    opened.run(f"document.querySelector('{heading} button').focus()")
    opened.press("Enter", 13, "\r")
    assert column(opened, 2) == ["20.0", "30.5", "9.25", ""]
    assert opened.run(f"document.querySelector('{heading}').ariaSort") == "descending"


@in_browser
def test_the_search_box_filters_rows(opened):
    opened.click("#runs input[type=search]")
    opened.write("failed AT most")
    assert column(opened, 0, "#runs table") == ["precision.target_bits=9"]
    assert "1 of 5 rows" in opened.run("document.querySelector('#runs .tools').textContent")
    opened.run("document.querySelector('#runs input').value = ''")
    opened.click("#tables input[type=search]")
    opened.write("nothing like it")
    assert column(opened, 0) == ["original"]


@in_browser
def test_every_run_is_listed_with_its_state_and_reason(opened):
    shown = dict(
        zip(column(opened, 0, "#runs table"), column(opened, 1, "#runs table"), strict=True)
    )
    assert sorted(shown.values()) == ["failed", "failed", "finished", "finished", "killed"]
    assert shown["killed-1"] == "killed"
    assert f"ran out of {HOSTILE}" in column(opened, 6, "#runs table")
    assert HOSTILE in opened.run("document.querySelector('h1').textContent")
    assert opened.run("document.querySelectorAll('b, script[src], [onerror]').length") == 0


@in_browser
def test_a_run_opens_with_its_layers_by_mouse_and_keyboard(opened):
    number = opened.run(
        "[...document.querySelectorAll('#runs tbody tr')].find(row =>"
        " row.cells[0].textContent === 'run-1').dataset.number"
    )
    opened.click(f"#runs tr[data-number='{number}'] button")
    run = f"#run-{number}"
    assert opened.run("document.activeElement.id") == f"run-{number}"
    field = f"{run} .map tbody tr:nth-child(2) td:nth-of-type(2)"
    opened.move_to(field)
    told = opened.run(f"document.querySelector({json.dumps(run + ' .readout')}).textContent")
    assert told == "block 1, mlp.down_proj: output_error 0.0217"
    opened.run(f"document.querySelector({json.dumps(run + ' .map td')}).focus()")
    opened.press("ArrowRight", 39)
    opened.press("ArrowRight", 39)
    opened.press("ArrowDown", 40)
    told = opened.run(f"document.querySelector({json.dumps(run + ' .readout')}).textContent")
    assert told == "block 2, mlp.down_proj: output_error no value"
    colours = opened.run(
        f"[...document.querySelectorAll({json.dumps(run + ' .map td:not(.empty)')})]"
        ".map(cell => getComputedStyle(cell).backgroundColor)"
    )
    assert len(colours) == len(set(colours)) == 5
    table = f"{run} table.layers"
    opened.run(f"document.querySelector({json.dumps(run + ' > details')}).open = true")
    place = LAYER_FIELDS.index("output_error")
    opened.click(f"{table} th:nth-child({place + 1}) button")
    opened.click(f"{table} th:nth-child({place + 1}) button")
    assert column(opened, place, table) == ["0.0307", "0.0217", "0.0207", "0.0117", "0.0107", ""]


@in_browser
def test_settings_that_differ_are_marked(page):
    with headless.Page(page, "#run-1") as shown:
        marked = shown.run(
            "[...document.querySelectorAll('#run-1 .tree mark')].map(m => m.parentNode.textContent)"
        )
        assert "target_bits: 3.5" in marked
        assert "name: gptq" not in marked
        assert "2.5" in shown.run(
            "[...document.querySelectorAll('#run-1 .tree mark')]"
            ".find(m => m.textContent === '3.5').title"
        )
        shown.click("#run-1 input[type=checkbox]")
        left = shown.run(
            "[...document.querySelectorAll('#run-1 .leaf')]"
            ".filter(e => e.offsetParent !== null).map(e => e.textContent)"
        )
        assert left == marked
        assert shown.problems == []


@in_browser
def test_colours_follow_the_system_and_the_button(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    with headless.Page(page) as shown:
        light = shown.run(ground)
        shown.prefer("dark")
        dark = shown.run(ground)
        assert light == "rgb(255, 255, 255)"
        assert dark != light
        card = "getComputedStyle(document.querySelector('figure img')).backgroundColor"
        assert shown.run(card) == light
        shown.click("#theme")
        assert (shown.run(ground), shown.run("theme.textContent")) == (light, "Colours: light")
        shown.prefer("light")
        shown.click("#theme")
        assert (shown.run(ground), shown.run("theme.textContent")) == (dark, "Colours: dark")
        shown.prefer("dark", "print")
        assert shown.run(ground) == light
        assert shown.run("getComputedStyle(document.querySelector('.tools')).display") == "none"


@in_browser
def test_all_pictures_are_drawn_and_a_narrow_window_needs_no_sideways_scrolling(page):
    with headless.Page(page, width=400) as shown:
        assert shown.run("document.documentElement.scrollWidth") <= 400
        drawn = "[...document.querySelectorAll('img')].map(i => i.complete && i.naturalWidth > 100)"
        pictures = shown.wait(f"(all => all.every(Boolean) && all)({drawn})")
        assert len(pictures) >= 5
        assert shown.problems == []


@in_browser
def test_the_name_of_a_run_breaks_where_there_is_no_room(page):
    with headless.Page(page, width=400) as shown:
        widths = "[...document.querySelectorAll('#tables td button')].map(b => b.offsetWidth)"
        long_name = "x-" * 60
        shown.run(f"document.querySelector('#tables td button').textContent = '{long_name}'")
        assert 0 < max(shown.run(widths)) < 300


@in_browser
def test_a_script_that_slipped_in_would_not_run(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("</main>", "<script>document.title='owned'</script></main>"))
    with headless.Page(broken) as shown:
        assert shown.run("document.title") != "owned"
        assert any("Content Security Policy" in problem for problem in shown.problems)


def test_two_hundred_runs_stay_small(tmp_path):
    made = []
    for number in range(200):
        changed = result({"config.seed": number})
        changed["bits"]["linear"] = 2 + number / 100
        made.append(changed)
    write_runs(tmp_path, *made)
    for place in (tmp_path / "name").iterdir():
        write_layers(place, blocks=105)
    path = tmp_path / "report.html"
    write_page(path, "Many", collect([tmp_path]), [], [])
    assert path.stat().st_size < 4_000_000
    if headless.browser():
        with headless.Page(path, "#run-199") as shown:
            assert shown.run("document.querySelectorAll('#run-199 .map td').length") == 210
            assert shown.problems == []


def test_the_parts_of_the_page_are_in_the_wheel(tmp_path):
    root = Path(__file__).parents[2]
    for part in ("claq_exp", "conf", "sweeps"):
        shutil.copytree(root / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / part, tmp_path)
    build = "from hatchling.build import build_wheel; print(build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"claq_exp/reporting/page.{kind}" for kind in ("html", "css", "js")} <= names
