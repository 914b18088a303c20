"""`claq-exp evaluate checkpoint=PATH` takes what others made, beside the original."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import gguf_files
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from gguf_files import write_gguf
from safetensors.torch import load_file

from claq_exp.cli import main
from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.foreign import found
from claq_exp.foreign.found import PACKAGES, Foreign, find_foreign
from claq_exp.foreign.load import load_foreign
from claq_exp.run import evaluate as evaluation

STORED = Path(__file__).parents[1] / "data" / "foreign"
NAMES = sorted(path.parent.name for path in STORED.glob("*/config.json"))
REQUEST = 2


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Folder of the tiny Llama behind the GGUF files, with 257 tokens."""
    folder = tmp_path_factory.mktemp("original") / "tiny"
    tiny_llama(hidden_size=64, intermediate_size=96, vocab_size=257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(text_file, tmp_path, monkeypatch, capfd):
    """Evaluate a checkpoint; return results, or the line of the refusal, and what was shown."""
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(tmp_path / "cache"))
    words = ["evaluation=perplexity", f"evaluation.corpora.wikipedia.path={text_file}"]
    words += ["evaluation.context=64", "evaluation.corpora.wikipedia.windows=2", "threads=1"]
    words += ["evaluation.kl_windows=1", "device=cpu", f"outputs={tmp_path / 'outputs'}"]

    def command(checkpoint: Path, *more: str, code: int = 0) -> tuple[dict, str]:
        capfd.readouterr()
        assert main(["evaluate", *words, f"checkpoint={checkpoint}", *more]) == code
        shown = capfd.readouterr()
        if code:
            (line,) = [t for t in shown.err.splitlines() if t.startswith("claq-exp: ")]
            return {}, line
        return json.loads(Path(shown.out.strip().splitlines()[-1]).read_text()), shown.out

    return command


def of(folder: Path) -> list[str]:
    return ["model=hf", f"model.source={folder}"]


def test_a_dense_folder_is_measured_like_its_original(evaluate, tiny_model):
    results, shown = evaluate(tiny_model, *of(tiny_model))
    row = results["perplexity"]["wikipedia"]
    assert row["quantized"] == pytest.approx(row["original"], rel=1e-6)
    assert abs(results["kl"]["wikipedia"]["mean"]) < 1e-4
    assert results["bits"]["linear"] == 16
    assert results["external"]["quant_method"] == "dense"
    assert "external: dense" in shown


def test_a_report_shows_what_others_made_beside_own_runs(
    evaluate, tiny_model, text_file, tmp_path, capfd
):
    evaluate(tiny_model, *of(tiny_model))
    words = [*of(tiny_model), "experiment=rtn_4bit", "calibration=text", "tracking=none"]
    words += [f"calibration.path={text_file}", "calibration.seqlen=64", "calibration.windows=2"]
    words += ["evaluation=perplexity", f"evaluation.corpora.wikipedia.path={text_file}"]
    words += ["evaluation.context=64", "evaluation.corpora.wikipedia.windows=2"]
    words += ["evaluation.kl_windows=1", "threads=1", f"outputs={tmp_path / 'outputs'}"]
    assert main(words) == 0
    assert main(["report", str(tmp_path / "outputs")]) == 0
    table = (tmp_path / "outputs/report.md").read_text()
    assert "dense (external)" in table
    assert "uniform" in table
    assert "Left out" not in table
    capfd.readouterr()
    (path,) = (tmp_path / "outputs").glob("default/external-tiny-*/results.json")
    results = json.loads(path.read_text())
    del results["external"]["name"]
    path.write_text(json.dumps(results))
    assert main(["report", str(tmp_path / "outputs")]) == 0
    assert "Left out" in capfd.readouterr().out


@pytest.mark.parametrize("vocabulary", [True, False])
def test_a_gguf_file_is_measured_on_the_tokens_of_its_own_or_the_originals_vocabulary(
    evaluate, original, tmp_path, vocabulary
):
    model = tiny_llama(hidden_size=64, intermediate_size=96, vocab_size=257)
    path = tmp_path / "tiny.Q4_0.gguf"
    write_gguf(path, model, "Q4_0", vocabulary=vocabulary)
    results, shown = evaluate(path, *of(original))
    assert results["bits"]["linear"] == 4.5
    assert results["size"]["checkpoint_bytes"] == path.stat().st_size
    assert 0 < results["kl"]["wikipedia"]["mean"] < 1
    assert results["perplexity"]["wikipedia"]["original"] > 1
    assert results["external"]["model"]["source"] == str(original)
    assert "external: gguf" in shown


def test_a_gguf_file_without_some_layers_is_refused(evaluate, tmp_path, monkeypatch):
    whole = gguf_files.gguf.GGUFWriter.add_tensor

    def add(writer, name, *rest, **options):
        if "blk.2.ffn_up" not in name:
            whole(writer, name, *rest, **options)

    monkeypatch.setattr(gguf_files.gguf.GGUFWriter, "add_tensor", add)
    write_gguf(tmp_path / "part.gguf", tiny_llama(hidden_size=64, vocab_size=257))
    _, line = evaluate(tmp_path / "part.gguf", code=1)
    assert "stores nothing for 1 linear layers, e.g. blk.2.ffn_up" in line


def test_a_pickled_folder_is_measured_too(evaluate, tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "pickled"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    results, _ = evaluate(folder)
    assert results["bits"]["linear"] == 16
    assert results["perplexity"]["wikipedia"]["quantized"] > 1


def test_without_the_original_a_line_says_so_and_without_a_tokenizer_it_is_asked_for(
    evaluate, original, tmp_path
):
    results, shown = evaluate(original)
    assert results["perplexity"]["wikipedia"]["original"] is None
    assert not results["kl"]
    assert "the original is left out: a checkpoint that others made does not name it" in shown
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama(hidden_size=64, vocab_size=257), vocabulary=False)
    _, line = evaluate(path, code=REQUEST)
    assert "has no tokenizer; name the original with model=" in line


def test_another_vocabulary_is_refused(evaluate, original, tiny_model):
    _, line = evaluate(original, *of(tiny_model), code=REQUEST)
    assert "has a vocabulary of 256, the checkpoint one of 257" in line


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_one_line_with_its_command(evaluate, name, monkeypatch):
    monkeypatch.setattr(found, "_is_there", lambda module: False)
    method = find_foreign(STORED / name).method
    _, line = evaluate(STORED / name, code=REQUEST)
    assert f"pip install {' '.join(PACKAGES[method].distributions)}" in line


def test_what_memory_does_not_hold_is_refused_in_one_line(evaluate, original, monkeypatch):
    monkeypatch.setattr(evaluation, "free_memory", lambda device: 1000)
    _, line = evaluate(original, code=REQUEST)
    assert "is loaded whole, about" in line
    assert "device_map=auto" in line


def test_a_file_that_is_no_gguf_is_refused(evaluate, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"1234567")
    _, line = evaluate(tmp_path / "x.bin", code=REQUEST)
    assert "is a file and no GGUF" in line


def test_folders_of_this_project_and_of_nothing_are_not_of_others(tmp_path):
    assert find_foreign(tmp_path) is None
    assert find_foreign(tmp_path / "nothing") is None
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "claq"}}')
    assert find_foreign(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "results.json").write_text("{}")
    assert find_foreign(tmp_path) is None


def test_config_json_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        find_foreign(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_owners_package_gives_the_logits_that_it_gave_when_the_file_was_made(name):
    """Skipped where the package is not installed."""
    foreign = find_foreign(STORED / name)
    for module in PACKAGES[foreign.method].modules:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            pytest.skip(f"{module} is not installed")
    model = load_foreign(foreign, dtype="float32", device="cpu")
    with torch.inference_mode():
        logits = model(torch.arange(8)[None]).logits[0, -1, :16].float()
    made = json.loads((STORED / name / "made.json").read_text())["logits"]
    torch.testing.assert_close(logits, torch.tensor(made), rtol=2e-2, atol=2e-3)


def test_packed_zero_points_are_read_as_their_format_says():
    pytest.importorskip("compressed_tensors")
    folder = STORED / "packed_zeros"
    model = load_foreign(find_foreign(folder), dtype="float32", device="cpu")
    stored, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.down_proj"
    codes, zeros = (  # eight in an int32: codes along inputs, zero points along outputs
        (stored[f"{name}.weight_{part}"].unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
        for part in ("packed", "zero_point")
    )
    zeros = zeros.transpose(1, 2).flatten(0, 1)
    grid = (codes.flatten(1) - zeros.repeat_interleave(32, dim=1)).float()
    scales = stored[f"{name}.weight_scale"].float().repeat_interleave(32, dim=1)
    found = model.get_submodule(name).weight
    torch.testing.assert_close(found, grid * scales, rtol=1e-3, atol=1e-5)
    assert zeros.unique().numel() > 1


def test_only_asymmetric_weights_alone_are_read_dequantized():
    grid = {"symmetric": False}
    for groups, expected in (
        ({"group_0": {"weights": grid, "input_activations": None}}, True),
        ({"group_0": {"weights": grid, "input_activations": {"num_bits": 8}}}, False),
        ({"group_0": {"weights": {"symmetric": True}}}, False),
        (None, False),
    ):
        quantization = {"config_groups": groups}
        assert Foreign(STORED, "compressed-tensors", quantization).has_packed_zeros() is expected
    assert not Foreign(
        STORED, "gptq", {"config_groups": {"0": {"weights": grid}}}
    ).has_packed_zeros()


def test_a_tensor_that_is_missing_is_named_and_not_made_up(tmp_path):
    pytest.importorskip("torchao")
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder = Path(shutil.copytree(STORED / "torchao", tmp_path / "torchao"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", about)
    with pytest.raises(CheckpointError, match=r"miss 1 tensors, e.g. model\.norm\.weight"):
        load_foreign(find_foreign(folder), dtype="float32", device="cpu")
