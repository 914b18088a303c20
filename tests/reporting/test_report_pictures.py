"""Pictures of many runs say what they show, keep their texts apart, and never change."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
from checkpoint.packed_models import Written
from run_samples import result, seeded, write_runs

from claq_exp.reporting import canvas, pictures
from claq_exp.reporting.collect import Run, collect
from claq_exp.reporting.column_pictures import read_columns
from claq_exp.reporting.lines import front, line_labels, panels, run_labels
from claq_exp.reporting.pictures import draw_report, quality_measures
from claq_exp.run_folder.layers import LAYER_FIELDS

HOSTILE = "</script><b>\"'&$x$ ünï"


def runs_of(folder: Path, *results: dict) -> list[Run]:
    return collect([write_runs(folder, *results)]).runs


def at(bits: float, perplexity: float | None, **changes: object) -> dict:
    """A result with so many linear bits and that perplexity."""
    made = result({f"config.{key.replace('__', '.')}": value for key, value in changes.items()})
    made["bits"]["linear"] = bits
    made["perplexity"]["words"]["quantized"] = perplexity
    return made


def add_layers(run: Run, blocks: int = 3, error: float = 0.1) -> None:
    lines = [",".join(LAYER_FIELDS)]
    for block, name in itertools.product(range(blocks), ("self_attn.q_proj", "mlp.down_proj")):
        row = dict.fromkeys(LAYER_FIELDS, "1")
        row |= {"block": str(block), "name": f"model.layers.{block}.{name}"}
        row |= {"output_error": f"{error * (block + 1):g}", "bits": "2.5"}
        lines.append(",".join(row[field] for field in LAYER_FIELDS))
    assert run.folder is not None
    (run.folder / "layers.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def figures(monkeypatch):
    """Keep every figure that is saved: title -> figure."""
    kept: dict[str, object] = {}
    original = canvas.save

    def save(figure, folder, name, title):
        kept[title] = figure
        return original(figure, folder, name, title)

    monkeypatch.setattr(pictures, "save", save)
    return kept


def texts(figure) -> list[str]:
    found = [text.get_text() for text in figure.texts]
    for legend in figure.legends:
        found += [text.get_text() for text in legend.get_texts()]
    for axis in figure.axes:
        found += [axis.get_title(loc="left"), axis.get_title(), axis.get_xlabel()]
        found += [label.get_text() for label in axis.get_yticklabels()]
    return [text for text in found if text]


def overlapping(figure) -> list[tuple[str, str]]:
    """Pairs of texts that cover each other."""
    figure.canvas.draw()  # the last one was for SVG, in other units
    renderer = figure.canvas.get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.texts]
    for legend in figure.legends:
        boxes.append(("legend", legend.get_window_extent(renderer)))
    for axis in figure.axes:
        own = [axis.xaxis.label, axis.yaxis.label, axis.title, axis._left_title]
        for one in (axis.xaxis, axis.yaxis):
            low, high = sorted(one.get_view_interval())
            ticks = [tick for tick in one.get_major_ticks() if low <= tick.get_loc() <= high]
            own += [tick.label1 for tick in ticks if tick.label1.get_visible()]
        boxes += [(t.get_text(), t.get_window_extent(renderer)) for t in own if t.get_text()]
    return [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(boxes, 2)
        if a.x0 + 1 < b.x1 and b.x0 + 1 < a.x1 and a.y0 + 1 < b.y1 and b.y0 + 1 < a.y1
    ]


def test_points_of_a_line_differ_in_bits_alone(tmp_path):
    runs = runs_of(
        tmp_path,
        at(2.3, 60.0, precision={"name": "outlier_order", "target_bits": 2.1}),
        at(3.3, 30.0, precision={"name": "outlier_order", "target_bits": 3.1}),
        at(3.3, 28.0, precision={"name": "hessian", "target_bits": 3.1}),
        at(3.3, 26.0, calibration={"windows": 32, "seed": 3}),
    )
    labels = line_labels(runs)
    (panel,) = panels(runs, "perplexity.words", labels)
    shown = {line.label: [(p.bits, p.value) for p in line.points] for line in panel.lines}
    method = "kmeans + AP outlier_order + OR outlier_order 0.005"
    assert shown == {
        f"{method}, calibration.windows=8": [(2.3, 60.0), (3.3, 30.0)],
        f"{method}, calibration.windows=32": [(3.3, 26.0)],
        "kmeans + AP hessian + OR outlier_order 0.005": [(3.3, 28.0)],
    }


def test_seeds_are_one_point_with_its_spread_and_infinity_is_left_out(tmp_path):
    made = [seeded(0), seeded(1), seeded(2), seeded(3)]
    for results, value in zip(made, (10.0, 12.0, 14.0, None), strict=True):
        results["perplexity"]["words"]["quantized"] = value
    runs = runs_of(tmp_path, *made)
    (panel,) = panels(runs, "perplexity.words", line_labels(runs))
    ((point,),) = [line.points for line in panel.lines]
    assert (point.value, point.deviation, point.runs, point.infinite) == (12.0, 2.0, 4, 1)
    assert panel.originals == [20.0]


def test_the_same_seed_again_is_no_other_draw(tmp_path):
    runs = runs_of(tmp_path, at(2.0, 10.0), at(2.0, 12.0))
    (panel,) = panels(runs, "perplexity.words", line_labels(runs))
    ((one, other),) = [line.points for line in panel.lines]
    assert {(one.value, one.deviation), (other.value, other.deviation)} == {
        (10.0, None),
        (12.0, None),
    }


def test_the_front_holds_what_no_other_point_beats(tmp_path):
    runs = runs_of(
        tmp_path,
        at(2.0, 50.0),
        at(2.5, 60.0, codebook={"name": "uniform"}),
        at(3.0, 20.0, codebook={"name": "quantile"}),
        at(4.0, 20.0),
    )
    (panel,) = panels(runs, "perplexity.words", line_labels(runs))
    assert [(p.bits, p.value) for p in front(panel.lines, "lower")] == [(2.0, 50.0), (3.0, 20.0)]
    assert [(p.bits, p.value) for p in front(panel.lines, "higher")] == [(2.0, 50.0), (2.5, 60.0)]


def test_other_tokens_have_a_panel_of_their_own(tmp_path):
    runs = runs_of(
        tmp_path,
        at(2.0, 50.0),
        result({"perplexity.words.tokens_sha256": "bb"}),
        result({"perplexity.words.tokens": 99, "perplexity.words.tokens_sha256": "cc"}),
    )
    assert len(panels(runs, "perplexity.words", line_labels(runs))) == 3


def test_results_without_a_hash_join_the_only_text_of_that_length(tmp_path):
    runs = runs_of(tmp_path, at(2.0, 50.0), result({"perplexity.words.tokens_sha256": None}))
    (panel,) = panels(runs, "perplexity.words", line_labels(runs))
    assert sum(len(line.points) for line in panel.lines) == 2


def test_average_accuracy_takes_the_place_of_the_tasks(tmp_path):
    quality = ["perplexity.words", "kl.words"]
    without = runs_of(tmp_path / "without", result())
    assert [m.key for m in quality_measures(without)] == [*quality, "accuracy.piqa"]
    average = {"average_accuracy": {"original": 0.7, "quantized": 0.6}}
    with_average = runs_of(tmp_path / "with", result(average))
    assert [m.key for m in quality_measures(with_average)] == [*quality, "average.accuracy"]


def test_run_labels_are_short_and_tell_every_run(tmp_path):
    runs = runs_of(tmp_path, result(), seeded(4), at(3.4, 1.0), at(2.0, 9.0))
    labels = run_labels(runs)
    assert len(set(labels)) == 4
    assert labels[0] == "kmeans + AP outlier_order + OR outlier_order 0.005, 2.00 bits"
    assert any(label.endswith("seed 4") for label in labels)


@pytest.mark.case(98)
def test_pictures_come_in_both_forms_and_repeat_byte_by_byte(tmp_path, figures):
    runs = runs_of(tmp_path, at(2.0, 90.0), at(3.0, None), at(4.0, 12.0))
    for run in runs:
        add_layers(run)
    again = tmp_path / "again"
    again.mkdir()
    first, second = draw_report(runs, tmp_path), draw_report(runs, again)
    assert [picture.title for picture in first] == [
        "words perplexity over linear bits",
        "words KL over linear bits",
        "piqa acc, % over linear bits",
        "Output error by block, small",
        "Relative output error of every layer, small",
        "Stored bits per weight of every layer, small",
        "Time and memory on CPU",
    ]
    for one, other in zip(first, second, strict=True):
        assert one.png.read_bytes() == other.png.read_bytes()
        assert one.svg.read_bytes() == other.svg.read_bytes()
        assert one.png.read_bytes()[:4] == b"\x89PNG"
    shown = texts(figures["words perplexity over linear bits"])
    assert "1 of 3 values are not finite." in "\n".join(shown)
    assert "not finite" in shown
    assert "original model (20.00)" in shown
    assert overlapping(figures["words perplexity over linear bits"]) == []


def test_a_value_that_is_not_finite_breaks_the_line(tmp_path, figures):
    runs = runs_of(tmp_path, at(2.0, 90.0), at(3.0, None), at(4.0, 12.0))
    draw_report(runs, tmp_path)
    axis = figures["words perplexity over linear bits"].axes[0]
    drawn = [list(line.get_ydata()) for line in axis.lines if len(line.get_ydata()) == 3]
    assert any(math.isnan(values[1]) for values in drawn)
    crosses = [line for line in axis.lines if line.get_marker() == "x"]
    assert [line.get_xdata()[0] for line in crosses] == [3.0]


def test_a_zero_original_does_not_stretch_a_logarithmic_axis(tmp_path, figures):
    made = [at(2.0, 90.0), at(4.0, 12.0)]
    made[0]["kl"]["words"]["mean"] = 2.0
    draw_report(runs_of(tmp_path, *made), tmp_path)
    axis = figures["words KL over linear bits"].axes[0]
    assert axis.get_yscale() == "log"
    assert axis.get_ylim()[0] > 0.05


@pytest.mark.case(98)
def test_many_runs_stay_readable_and_say_what_is_left_out(tmp_path, figures):
    books = ("kmeans", "uniform", "quantile", "normal_float", "kmeans_exact")
    rules = ("outlier_order", "hessian", "random", "magnitude")
    made = [
        at(bits, 100 / bits + place, codebook={"name": book}, precision={"name": rule})
        for place, (book, rule) in enumerate(itertools.product(books, rules))
        for bits in (2.1, 2.5, 3.0, 3.5)
    ]
    runs = runs_of(tmp_path, *made)
    for run in runs:
        add_layers(run)
    draw_report(runs, tmp_path)
    shown = texts(figures["words perplexity over linear bits"])
    assert "Grey dots: 4 further methods, each with few points." in "\n".join(shown)
    assert "40 of 80 runs, evenly chosen by linear bits." in "\n".join(
        texts(figures["Time and memory on CPU"])
    )
    assert "72 other runs" in texts(figures["Output error by block, small"])
    maps = figures["Relative output error of every layer, small"]
    assert any(text.startswith("6 of 80 runs") for text in texts(maps))
    assert {title: pairs for title, f in figures.items() if (pairs := overlapping(f))} == {}


def test_models_have_panels_and_names_of_any_letters(tmp_path, figures):
    made = [
        at(bits, 50 / bits, model={"name": name}, **{"reservation": {"name": "none"}})
        for name in (HOSTILE, "llama2_7b", "opt_125m")
        for bits in (2.0, 3.0)
    ]
    runs = runs_of(tmp_path, *made)
    drawn = draw_report(runs, tmp_path)
    figure = figures["words perplexity over linear bits"]
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        HOSTILE,
        "llama2_7b",
        "opt_125m",
    ]
    assert overlapping(figure) == []
    assert all(picture.svg.is_file() and picture.png.is_file() for picture in drawn)


def test_experts_of_a_mixture_share_a_row(tmp_path, figures):
    (run,) = runs_of(tmp_path, result())
    assert run.folder is not None
    lines = [",".join(LAYER_FIELDS)]
    for expert in range(30):
        row = dict.fromkeys(LAYER_FIELDS, "1")
        row |= {"block": "0", "name": f"model.layers.0.mlp.experts.{expert}.w1"}
        row |= {"output_error": f"{expert + 1}", "bits": "2"}
        lines.append(",".join(row[field] for field in LAYER_FIELDS))
    (run.folder / "layers.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_report([run], tmp_path)
    figure = figures["Relative output error of every layer, small"]
    assert figure.axes[0].images[0].get_array().tolist() == [[15.5]]
    assert "mlp.experts.*.w1" in texts(figure)
    assert any(text.startswith("A star stands for any number") for text in texts(figure))


def test_devices_do_not_share_a_picture_of_time(tmp_path, figures):
    runs = runs_of(tmp_path, at(2.0, 9.0), result({"run.device": "NVIDIA H100"}))
    draw_report(runs, tmp_path)
    assert {"Time and memory on CPU", "Time and memory on NVIDIA H100"} <= set(figures)


def test_pictures_of_an_earlier_report_go_and_other_files_stay(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("words_kl.png", "words_kl.svg", "mine.png"):
        (folder / name).write_bytes(b"old")
    drawn = draw_report(runs_of(tmp_path / "runs", at(2.5, 30.0)), folder)
    left = {path.name for path in folder.iterdir()}
    assert left == {path.name for item in drawn for path in (item.png, item.svg)} | {"mine.png"}


@pytest.mark.case(98)
def test_one_run_alone_is_drawn(tmp_path):
    (run,) = runs_of(tmp_path, at(2.0, 90.0))
    add_layers(run, blocks=1)
    drawn = draw_report([run], tmp_path)
    assert drawn
    assert all(picture.png.stat().st_size > 1000 for picture in drawn)


def test_unfinished_runs_alone_make_no_picture(tmp_path):
    assert draw_report([], tmp_path) == []


def test_columns_are_counted_as_the_checkpoint_has_them(tmp_path, tiny_model, figures):
    runs = runs_of(tmp_path, at(2.0, 9.0), at(3.0, 8.0))
    assert runs[0].folder is not None
    written = Written(tiny_model)
    folder = written.write(runs[0].folder / "checkpoint")
    widths: Counter[int] = Counter()
    reserved: Counter[int] = Counter()
    for weight in written.quantized.values():
        widths.update(weight.column_bits.tolist())
        reserved.update(weight.reserved.counts.tolist())
    columns = read_columns(folder)
    assert (columns.widths, columns.reserved) == (widths, reserved)
    draw_report(runs, tmp_path)
    figure = figures["Columns of each width"]
    bars = [bar.get_height() for bar in figure.axes[0].patches]
    assert bars == pytest.approx([100 * widths[w] / widths.total() for w in sorted(widths)])
    assert "1 of 2 runs have no readable checkpoint left." in texts(figure)
    entries = [bar.get_height() for bar in figures["Reserved entries per column"].axes[0].patches]
    assert sum(entries) == pytest.approx(100)
    assert entries[0] == pytest.approx(100 * reserved[0] / reserved.total())


def test_layers_csv_is_what_the_maps_show(tmp_path, figures):
    (run,) = runs_of(tmp_path, result())
    add_layers(run)
    draw_report([run], tmp_path)
    figure = figures["Relative output error of every layer, small"]
    shown = figure.axes[0].images[0].get_array().tolist()
    rows = run.layers
    assert shown == [
        [row["output_error"] for row in rows if row["name"].endswith(name)]
        for name in ("q_proj", "down_proj")
    ]
