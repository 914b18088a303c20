"""examples/peers: costs of a command, table and picture."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples" / "peers"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a script in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def command(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        return runpy.run_path(str(SCRIPTS / script), run_name="__main__")

    yield command
    sys.modules.pop("measured", None)


def test_cpu_seconds_and_memory_of_a_command_are_noted_and_replaced(run, tmp_path):
    work = "x = bytearray(200 << 20)\nfor i in range(10**7): i * i"
    for name in ("a", "b", "a"):
        with pytest.raises(SystemExit) as ended:
            run("measured.py", name, sys.executable, "-c", work)
        assert ended.value.code == 0
    lines = (tmp_path / "made" / "costs.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["name", "a", "b"]
    _, seconds, wall, peak = lines[1].split(",")
    assert 0 < float(seconds) <= float(wall) + 1
    assert float(peak) >= 0.19
    with pytest.raises(SystemExit) as ended:
        run("measured.py", "c", sys.executable, "-c", "raise SystemExit(3)")
    assert ended.value.code == 3
    assert len((tmp_path / "made" / "costs.csv").read_text().splitlines()) == len(lines)


def test_table_and_picture_have_a_row_for_each_checkpoint(run, tmp_path, capsys):
    external = {"group_size": 64}
    for bits, (checkpoint, about) in enumerate(
        [
            ("own/rd2.3/run-1/checkpoint", None),
            ("own/default/run-2/checkpoint", None),
            ("own/kmeans4/run-3/checkpoint", None),
            ("made/ar2ext/model-w2", external),
            ("made/ar3-200/model-w3", external),
            ("made/llmc3", external),
            ("made/hqq4", {"group_size": None}),
            ("own/free4.5/run-4/checkpoint", None),
            ("made/IQ4_NL.gguf", {"group_size": None}),
        ],
        start=2,
    ):
        results = {
            "checkpoint": str(tmp_path / checkpoint),
            "bits": {"linear": bits},
            "perplexity": {"words": {"original": 10.0, "quantized": 100 / bits}},
            "kl": {"words": {"mean": 1 / bits}},
        }
        if about:
            results["external"] = about
        folder = tmp_path / "outputs" / "peers" / f"r{bits}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
    (tmp_path / "made").mkdir()
    header = "name,cpu_seconds,wall_seconds,peak_gib"
    (tmp_path / "made" / "costs.csv").write_text(f"{header}\nllmc3,102.4,120,1.5\n")
    older = "Tiny,old,HQQ,2 bits,9.5,11.0,0.2,10.0,,"
    columns = "model,name,family,label,bits,perplexity,kl,original,cpu_seconds,peak_gib"
    again = older.replace("old", "default")  # measured now, so this line is replaced
    (tmp_path / "peers.csv").write_text(f"{columns}\n{older}\n{again}\n")
    run("table.py", tmp_path, f"Tiny={tmp_path}")
    title, _, *table = capsys.readouterr().out.strip().splitlines()
    assert title == "## Tiny"
    assert [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in table[3:]] == [
        ("this project", "rate distortion, 2.3 bits"),
        ("this project", "default run"),
        ("this project", "k-means columns, 4 bits"),
        ("AutoRound, alg_ext", "2 bits, groups of 64"),
        ("AutoRound", "3 bits, groups of 64, 200 iterations"),
        ("GPTQ of llm-compressor", "3 bits, groups of 64"),
        ("HQQ", "4 bits"),
        ("this project", "best, 4.5 bits"),
        ("HQQ", "2 bits"),
        ("llama.cpp", "IQ4_NL"),
    ]
    assert len((tmp_path / "peers.csv").read_text().splitlines()) == 11
    assert "| 7.00 | 14.29 | 0.143 | 102 | 1.5 |" in table[8]
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_the_loop_is_a_shell_script_that_parses():
    subprocess.run(["bash", "-n", str(SCRIPTS / "measure_all.sh")], check=True)
