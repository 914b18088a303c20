"""claq-exp inspect and claq-exp export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_models import SHARED_LINEAR, SOME_LINEAR, Written

import claq_exp
from claq_exp.checkpoint.reader import load_model, read_layouts
from claq_exp.checkpoint.summary import summarize
from claq_exp.checkpoint.writer import checkpoint_sizes
from claq_exp.cli import main
from claq_exp.errors import ConfigError
from claq_exp.export import dense
from claq_exp.export.dense import write_dense
from claq_exp.models.load import load_model as load_original

REQUEST, RUN = 2, 1
TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def written(tiny_model: Path) -> Written:
    return Written(tiny_model)


@pytest.fixture(scope="module")
def run_folder(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as an old run left it, with a config.json of its own beside the checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text("{}")
    written.write(folder / "checkpoint")
    return folder


@pytest.fixture(scope="module")
def checkpoint(run_folder: Path) -> Path:
    return run_folder / "checkpoint"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")


def complaint(capfd: pytest.CaptureFixture[str]) -> str:
    error = capfd.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("claq-exp: ")]
    return line


def cells(text: str, first: str) -> list[str]:
    """Return the cells of the one row that begins with `first`."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
    (row,) = [row for row in rows if row[0] == first]
    return row


# inspect


def test_inspect_shows_the_bits_the_size_and_the_ledger(written, checkpoint, capsys):
    assert main(["inspect", str(checkpoint)]) == 0
    text = capsys.readouterr().out
    parameters = sum(parameter.numel() for parameter in written.model.parameters())
    sizes = checkpoint_sizes(checkpoint, read_layouts(checkpoint), parameters)
    assert cells(text, "parameters")[1] == f"{parameters:,}"
    for kind in ("nominal", "linear", "model"):
        assert cells(text, f"{kind} bits per weight")[1] == f"{getattr(sizes, kind):.3f}"
    shares = [float(cells(text, name)[2]) for name, n in sizes.ledger.as_dict().items() if n]
    assert sum(shares) == pytest.approx(100, abs=0.05)
    bits = [cells(text, name)[3] for name, n in sizes.ledger.as_dict().items() if n]
    assert sum(float(cell) for cell in bits if cell) == pytest.approx(sizes.linear, abs=1e-3)
    assert cells(text, "total")[3] == f"{sizes.linear:.4f}"


def test_inspect_shows_the_column_bits_and_the_reserved_entries(written, checkpoint, capsys):
    assert main(["inspect", str(checkpoint)]) == 0
    text = capsys.readouterr().out
    for width in (2, 4):
        columns = sum(int((w.column_bits == width).sum()) for w in written.quantized.values())
        assert int(cells(text, str(width))[1].replace(",", "")) == columns
        assert "█" in cells(text, str(width))[3]
    reserved = sum(len(weight.reserved.rows) for weight in written.quantized.values())
    assert int(cells(text, "all layers")[1].replace(",", "")) == reserved
    assert "names begin with model.layers." in text


def test_the_reserved_entries_of_the_fullest_columns_are_counted(written, checkpoint):
    for layer in summarize(checkpoint).layers:
        counts = written.quantized[layer.name].reserved.counts
        assert layer.in_full_columns == int(counts.max())  # 1 % of so few columns is one


def test_inspect_lists_layers_only_when_it_is_asked_to(checkpoint, capsys):
    short = SOME_LINEAR.removeprefix("model.layers.")
    assert main(["inspect", str(checkpoint)]) == 0
    assert "bits:columns" not in capsys.readouterr().out
    assert main(["inspect", str(checkpoint), "--layers"]) == 0
    text = capsys.readouterr().out.partition("bits:columns")[2]
    assert f"  {short} " in text
    assert text.count("_proj ") == len(read_layouts(checkpoint))


def test_inspect_takes_the_checkpoint_of_a_run(run_folder, capsys):
    assert main(["inspect", str(run_folder)]) == 0
    assert str(run_folder / "checkpoint") in capsys.readouterr().out


def test_inspect_writes_nothing_but_the_picture_that_is_asked_for(run_folder, tmp_path):
    before = sorted(run_folder.rglob("*"))
    assert main(["inspect", str(run_folder), "--plot", str(tmp_path / "bits.png")]) == 0
    assert sorted(run_folder.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bits.png"]
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words", [[], ["a", "b"], ["--layer", "a"], ["a", "--plot"], ["a", "--plot", "x.gif"]]
)
def test_inspect_says_how_it_is_called(words, capfd):
    assert main(["inspect", *words]) == REQUEST
    assert "inspect needs one folder or GGUF file" in complaint(capfd)


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_a_folder_without_a_checkpoint_is_refused(command, tiny_model, tmp_path, capfd):
    more = [str(tmp_path / "new")] if command == "export" else []
    for missing in ("nothing", "nothing.gguf"):
        assert main([command, str(tmp_path / missing), *more]) == REQUEST
        assert f"{missing}' does not exist" in complaint(capfd)
    if command == "dequantize":  # the other one takes what others made
        assert main([command, str(tiny_model), *more]) == REQUEST
        assert "is not quantized by claq_exp" in complaint(capfd)
    assert main([command, str(tmp_path), *more]) == REQUEST
    assert "no folder with a config.json" in complaint(capfd)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_a_damaged_checkpoint_is_refused(command, checkpoint, tmp_path, capfd):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    more = [str(tmp_path / "new")] if command == "export" else []
    assert main([command, str(folder), *more]) == RUN
    assert "is not the file that was written: the tensor" in complaint(capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


# export

PLAIN = """\
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
assert len(AutoTokenizer.from_pretrained(sys.argv[1])("abc").input_ids) == 3
with torch.inference_mode():
    logits = model(torch.arange(24).reshape(2, 12)).logits
torch.save((logits, model.state_dict()), sys.argv[2])
assert "claq_exp" not in sys.modules
"""


def plainly_computed(folder: Path, scratch: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What transformers alone computes and holds, in a process that never saw claq_exp."""
    path = scratch / "plain.pt"
    subprocess.run([sys.executable, "-c", PLAIN, str(folder), str(path)], check=True, cwd=scratch)
    return torch.load(path)


@pytest.mark.other_process
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_transformers_alone_computes_the_same(dtype, run_folder, tmp_path, capsys):
    target = tmp_path / "dense"
    assert main(["export", str(run_folder), str(target), f"dtype={dtype}"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    model = load_model(run_folder / "checkpoint", dtype=dtype)
    with torch.inference_mode():
        expected = model(TOKENS).logits
    found, state = plainly_computed(target, tmp_path)
    assert found.dtype == getattr(torch, dtype)
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    torch.testing.assert_close(found, expected)  # of equal numbers, maybe on other threads


def test_a_dense_checkpoint_is_an_ordinary_one(written, checkpoint, tmp_path):
    target = tmp_path / "dense"
    assert main(["export", str(checkpoint), str(target)]) == 0
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float16"
    kept = {path.name for path in checkpoint.iterdir()} - {"manifest.json"}
    assert {path.name for path in target.iterdir()} == kept
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in target.iterdir())
    weight = load_original(target, dtype="float32", device="cpu").get_submodule(SHARED_LINEAR)
    assert torch.equal(weight.weight, written.quantized[SHARED_LINEAR].dequantize().half().float())


def test_a_large_dense_checkpoint_has_shards(checkpoint, tmp_path):
    write_dense(checkpoint, tmp_path / "dense", dtype="bfloat16", shard_bytes=100_000)
    assert len(list((tmp_path / "dense").glob("model-*.safetensors"))) > 1
    found = load_original(tmp_path / "dense", dtype="bfloat16", device="cpu").state_dict()
    for name, tensor in load_model(checkpoint, dtype="bfloat16").state_dict().items():
        assert torch.equal(found[name], tensor)


def test_export_leaves_what_exists_alone(checkpoint, tmp_path, capfd):
    (tmp_path / "mine.txt").write_text("keep me")
    assert main(["export", str(checkpoint), str(tmp_path)]) == REQUEST
    assert "exists already" in complaint(capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_export_leaves_nothing_when_it_fails(checkpoint, tmp_path, monkeypatch, capfd):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "tokenizer.json")

    monkeypatch.setattr("claq_exp.export.folder.copy_file", full)
    assert main(["export", str(checkpoint), str(tmp_path / "dense")]) == RUN
    assert "No space left" in complaint(capfd)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "export needs a folder and a target"),
        (["a"], "export needs a folder and a target"),
        (["a", "b", "--fast"], "export needs a folder and a target"),
        (["a", "b", "dtype=int8"], "format=dense: dtype 'int8' is not known; choose one of:"),
        (["a", "b", "format=awq"], "format 'awq' is not known; choose one of: compressed-tensors"),
        (["a", "b", "dtpye=float16"], "option 'dtpye' is not known; choose one of: dtype, format"),
    ],
)
def test_export_says_how_it_is_called(words, said, capfd):
    assert main(["export", *words]) == REQUEST
    assert said in complaint(capfd)


@pytest.mark.case(144)
def test_a_target_that_another_process_makes_meanwhile_is_an_error(
    checkpoint, tmp_path, capfd, monkeypatch
):
    target = tmp_path / "plain"
    whole = dense.load_model

    def slow(*args, **options):
        target.mkdir()
        (target / "mine").write_text("first")
        return whole(*args, **options)

    monkeypatch.setattr(dense, "load_model", slow)
    assert main(["export", str(checkpoint), str(target)]) == 1
    line = complaint(capfd)
    assert str(target) in line
    assert "another process made this folder meanwhile" in line
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.case(145)
def test_every_loader_takes_the_folder_of_a_run(run_folder, tmp_path, text_file, capfd):
    assert claq_exp.load(run_folder).config.model_type == "llama"
    folder = str(run_folder)
    assert main(["inspect", folder]) == 0
    assert main(["export", folder, str(tmp_path / "plain")]) == 0
    words = ["evaluation=perplexity", f"evaluation.corpora.wikipedia.path={text_file}"]
    words += ["evaluation.context=32", "evaluation.corpora.wikipedia.windows=1", "threads=1"]
    words += [f"checkpoint={folder}", f"outputs={tmp_path}"]
    assert main(["evaluate", *words]) == 0
    assert "perplexity, wikipedia" in capfd.readouterr().out


@pytest.mark.case(145)
@pytest.mark.parametrize("command", ["inspect", "load"])
def test_a_run_that_has_no_checkpoint_yet_says_how_it_stands(command, tmp_path, capfd):
    (tmp_path / "state.json").write_text('{"state": "failed", "reason": "no room"}')
    (tmp_path / "settings.json").write_text("{}")
    if command == "load":
        with pytest.raises(ConfigError) as caught:
            claq_exp.load(tmp_path)
        line = str(caught.value)
    else:
        assert main(["inspect", str(tmp_path)]) == 2
        line = complaint(capfd)
    assert "is a run without a checkpoint: it is failed (no room)" in line


@pytest.mark.case(145)
def test_the_folder_above_runs_names_one_of_them(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name / "checkpoint").mkdir(parents=True)
        (tmp_path / name / "checkpoint" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds runs, 2 in all; name one") as caught:
        claq_exp.load(tmp_path)
    assert str(caught.value).endswith(str(tmp_path / "a"))
