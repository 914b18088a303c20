"""The lines of a run that quantizes: one for each block, and with -v one for each tensor."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from claq_exp.cli import main
from claq_exp.run.lines import block_line, event_lines, layer_lines
from claq_exp.tracking.progress import RunProgress

ROW = {
    "block": 11,
    "name": "model.layers.11.self_attn.q_proj",
    "rows": 4096,
    "cols": 4096,
    "bits": 2.15,
    "output_error": 0.03,
    "raised_damping": None,
    "dead_columns": 0,
    "tokens": 16384,
    "seconds": 1.3,
}
FALLEN = {**ROW, "name": "model.layers.11.mlp.down_proj", "cols": 2048, "bits": 4.13}
FALLEN |= {"output_error": 0.01, "raised_damping": 0.1, "dead_columns": 3}


def test_a_block_is_one_line_of_a_small_terminal():
    line = block_line("block 12/126", [ROW, FALLEN], 1234.56, 123 * 2**30)
    assert re.split(r"  +", line) == [
        "block 12/126",
        "error 0.02",
        "2.81 bits",  # (2.15 * 2 + 4.13) / 3: by weights
        "peak 123.0 GiB",
        "1234.6 s",
        "1 fallback",
    ]
    assert len(line) < 80


def test_a_tensor_tells_its_fallbacks_and_their_reasons():
    assert len(layer_lines(ROW)) == 1
    first, *reasons = layer_lines(FALLEN)
    assert " ".join(first.split()) == "mlp.down_proj 4096 x 2048 error 0.01 4.13 bits 1.3 s"
    assert len(first) < 80
    assert all(line.startswith("    ") and len(line) < 80 for line in reasons)
    assert " ".join(" ".join(reasons).split()) == (
        "needed a larger damping than solver.damping (raised_damping: 0.1); more "
        "calibration.windows help had inputs that were zero on every calibration token, whose "
        "columns are not compensated (dead_columns: 3)"
    )


def test_only_rows_of_the_block_count_and_tensors_are_asked_for():
    def lines(event: str, data: dict, *, verbose: bool = False) -> list[str]:
        ends = [("wte", 16.0), ("lm_head", 5.0)]
        rows = [ROW, {**ROW, "block": 2, "bits": 8.0}]
        rows += [{**ROW, "block": None, "name": name, "bits": bits} for name, bits in ends]
        return list(event_lines(event, data, lambda: rows, 40, peak=2**30, verbose=verbose))

    (line,) = lines("block", {"block": 11, "solve": 1.0, "calibrate": 2.0, "peak_memory_bytes": 0})
    assert line.startswith("block 12/40 ")
    assert " 2.15 bits" in line
    assert " 3.0 s" in line
    end = {"stage": "embedding", "name": "wte", "end": "embedding", "solve": 1.0}
    (line,) = lines("stage", end)
    assert line.startswith("embedding ")
    assert "16.00 bits  peak   1.0 GiB" in line
    (line,) = lines("stage", {**end, "name": "lm_head", "end": "head"})
    assert line.startswith("head ")
    assert " 5.00 bits" in line
    assert lines("layer", ROW) == []
    assert len(lines("layer", ROW, verbose=True)) == 1
    assert lines("transform", {"block": 1}) == []


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_stays_above_the_bar(terminal):
    stream = io.StringIO()
    bar = RunProgress({"quantize": 1.0}, Console(file=stream, force_terminal=terminal, width=80))
    with bar:
        bar.stage("quantize")
        bar.line("block 1/2 [bold]")
    text = stream.getvalue()
    assert "block 1/2 [bold]\n" in text
    assert ("\x1b" in text) == terminal
    if terminal:
        assert text.index("block 1/2") < text.rindex("quantize")  # the bar is drawn again below


def test_a_bar_of_another_process_shows_no_lines():
    stream = io.StringIO()
    bar = RunProgress({"quantize": 1.0}, Console(file=stream), on_share=lambda *_: None)
    bar.line("block 1/2")
    assert stream.getvalue() == ""


def test_a_piped_run_prints_plain_lines(tiny_run, capfd):
    assert main([*tiny_run, "threads=1", "-v"]) == 0
    text = capfd.readouterr().err
    assert "\x1b" not in text
    lines = text.splitlines()
    places = [n for n, line in enumerate(lines) if line.startswith("block ")]
    assert [lines[place].split()[1] for place in places] == ["1/3", "2/3", "3/3"]
    for place in places:  # its seven tensors stand before it
        assert all(line.startswith("  ") for line in lines[place - 7 : place])
    assert any(line.startswith("embedding ") for line in lines)
    assert any(re.match(r"checkpoint: \d+\.\d\d linear bits, \d+\.\d\d model", x) for x in lines)


def test_without_v_there_are_no_tensors(tiny_run, capfd):
    assert main([*tiny_run, "threads=1"]) == 0
    text = capfd.readouterr().err
    assert "block 3/3" in text
    assert "q_proj" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "-v"], "-v goes with run"),
        (["fetch", "-v"], "-v goes with run"),
        (["-v", "-m", "seed=1,2"], "leave out -m"),
        (["-v", "sweep=claq"], "leave it out of a sweep"),
        (["-v", "--cfg", "job"], "leave out --cfg"),
    ],
)
def test_v_is_refused_where_it_shows_nothing(words, said, capfd):
    assert main(words) == 2
    assert said in capfd.readouterr().err
