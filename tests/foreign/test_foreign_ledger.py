"""The bits of what others made, from the headers of files: no package of theirs is needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file

from claq_exp.cli import main
from claq_exp.errors import CheckpointError
from claq_exp.foreign.found import find_foreign
from claq_exp.foreign.ledger import ForeignLedger, read_ledger
from claq_exp.foreign.purposes import OF_LINEARS, code_bits, type_bits

STORED = Path(__file__).parents[1] / "data" / "foreign"
NAMES = sorted(path.parent.name for path in STORED.glob("*/config.json"))
# rows x columns of the linear layers of the stored model
SHAPES = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
WEIGHTS = sum(rows * columns for rows, columns in SHAPES)
PARAMETERS = WEIGHTS + 256 * 64 + 3 * 64


def ledger_of(path: Path) -> ForeignLedger:
    foreign = find_foreign(path)
    assert foreign is not None
    return read_ledger(foreign)


def files_of(folder: Path) -> int:
    """Bytes of weights and config.json."""
    kept = [path for path in folder.iterdir() if path.name != "made.json"]
    return sum(path.stat().st_size for path in kept)


def test_all_owners_are_here():
    assert {find_foreign(STORED / name).method for name in NAMES} == {
        *("auto-round", "gptq", "awq", "compressed-tensors", "bitsandbytes", "torchao", "hqq")
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_of_the_files_is_in_one_account(name):
    ledger = ledger_of(STORED / name)
    assert ledger.bytes == files_of(STORED / name)
    assert sum(ledger.accounts.values()) == 8 * ledger.bytes
    assert all(bits >= 0 for bits in ledger.accounts.values())
    assert not ledger.notes()
    assert len(ledger.linears) == len(SHAPES)
    of_linears = sum(linear.stored for linear in ledger.linears)
    assert ledger.linear * ledger.weights == pytest.approx(of_linears)
    assert of_linears == sum(ledger.accounts.get(account, 0) for account in OF_LINEARS)


def bits(name: str) -> float:
    """Bits of the linear layers, by what each format's documentation says that it stores."""
    total = 0.0
    for rows, columns in SHAPES:
        groups, weights = columns // 32, rows * columns
        if name in ("gptq", "awq"):  # float16 scales, packed zeros, and of gptq an int32 a column
            total += 4 * weights + groups * rows * (16 + 4)
            total += 32 * columns if name == "gptq" else 0
        elif name == "auto_round":  # codes fill 32-bit words without a gap
            total += 3 * weights + groups * rows * (16 + 3)
        elif name == "compressed_tensors":  # and the shape in two int64
            total += 4 * weights + groups * rows * 16 + 128
        elif name == "packed_zeros":  # the same, and eight zero points of a group in a word
            total += 4 * weights + groups * rows * 16 + groups * -(-rows // 8) * 32 + 128
        elif name == "torchao":  # float32 scale and zero of 8 bits for each row
            total += 8 * weights + rows * (32 + 8)
        elif name == "hqq":  # ten codes in a word, groups as rows; scale and zero in float16
            total += 32 * -(-(groups * rows) // 10) * 32 + groups * rows * 32
    return total / WEIGHTS


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bitsandbytes"])
def test_linear_bits_are_those_that_the_format_asks_for(name):
    ledger = ledger_of(STORED / name)
    assert ledger.weights == WEIGHTS
    assert ledger.parameters == PARAMETERS
    assert ledger.linear == pytest.approx(bits(name))
    assert ledger.model == pytest.approx(8 * files_of(STORED / name) / PARAMETERS)


@pytest.mark.parametrize(
    ("name", "nominal"),
    [
        *[
            (name, 4)
            for name in ("gptq", "awq", "compressed_tensors", "packed_zeros", "bitsandbytes")
        ],
        *[("auto_round", 3), ("hqq", 3), ("torchao", 8)],
    ],
)
def test_nominal_bits_are_those_of_the_config(name, nominal):
    ledger = ledger_of(STORED / name)
    assert {linear.nominal for linear in ledger.linears} == {nominal}


@pytest.mark.parametrize(
    ("kind", "stored", "nominal"),
    [(None, 16, 16), ("Q4_0", 4.5, 4), ("Q4_1", 5, 4), ("Q5_0", 5.5, 5), ("Q8_0", 8.5, 8)],
)
@pytest.mark.parametrize("vocabulary", [True, False])
def test_the_whole_of_a_gguf_file_is_accounted_for(kind, stored, nominal, vocabulary, tmp_path):
    model = tiny_llama(hidden_size=64, intermediate_size=96, vocab_size=257)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, kind, vocabulary=vocabulary)
    ledger = ledger_of(path)
    assert ledger.bytes == path.stat().st_size
    assert sum(ledger.accounts.values()) == 8 * ledger.bytes
    assert ledger.linear == stored
    assert ledger.nominal == nominal
    assert ledger.accounts["embedding"] == 16 * 257 * 64
    assert ledger.accounts["unquantized"] == 32 * 64 * (2 * 3 + 1)
    assert ledger.parameters == sum(p.numel() for p in model.parameters())
    assert not ledger.notes()


def test_a_dense_folder_and_its_pickled_form_have_sixteen_bits(tiny_model, tmp_path):
    dense = ledger_of(tiny_model)
    assert (dense.linear, dense.nominal) == (16, 16)
    shutil.copy(tiny_model / "config.json", tmp_path)
    state = load_file(tiny_model / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # shares its bytes
    torch.save(state, tmp_path / "pytorch_model.bin")
    pickled = ledger_of(tmp_path)
    assert pickled.linear == 16
    assert pickled.accounts["embedding"] == dense.accounts["embedding"]
    assert sum(pickled.accounts.values()) == 8 * files_of(tmp_path)


def test_what_belongs_to_no_part_and_what_has_no_purpose_is_named(tmp_path):
    folder = Path(shutil.copytree(STORED / "gptq", tmp_path / "gptq"))
    state = load_file(folder / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    state |= {"vision.proj.qweight": torch.zeros(8), f"{layer}.marlin_heap": torch.zeros(4)}
    for name in [name for name in state if "down_proj" in name]:
        del state[name]
    save_file(state, folder / "model.safetensors")
    ledger = ledger_of(folder)
    assert ledger.unattributed == ("vision.proj.qweight",)
    assert ledger.accounts["unattributed"] == 8 * 32
    assert ledger.unknown == (f"{layer}.marlin_heap",)
    assert ledger.accounts["unknown"] == 4 * 32
    assert ledger.missing == ("model.layers.0.mlp.down_proj",)
    assert len(ledger.notes()) == 3
    assert sum(ledger.accounts.values()) == 8 * files_of(folder)


def test_a_layer_that_was_left_alone_counts_with_its_sixteen_bits(tmp_path):
    folder = Path(shutil.copytree(STORED / "awq", tmp_path / "awq"))
    state = load_file(folder / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    for name in [name for name in state if name.startswith(layer)]:
        del state[name]
    state[f"{layer}.weight"] = torch.zeros(96, 64, dtype=torch.bfloat16)
    save_file(state, folder / "model.safetensors")
    ledger = ledger_of(folder)
    (alone,) = [linear for linear in ledger.linears if linear.name == layer]
    assert (alone.bits, alone.nominal) == (16, 16)
    assert ledger.accounts["dense"] == 16 * 96 * 64


def test_eight_bit_floats_are_codes_and_their_scales_scales(tiny_model, tmp_path):
    """As of DeepSeek and of MX formats; written here, for no package makes them on a CPU."""
    config = json.loads((tiny_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {}
    for name, weight in load_file(tiny_model / "model.safetensors").items():
        if "_proj" in name:
            state[name] = weight.to(torch.float8_e4m3fn)
            ones = torch.ones(len(weight), 1)
            state[f"{name}_scale_inv"] = ones.to(torch.float8_e8m0fnu) if "mlp" in name else ones
        else:
            state[name] = weight
    save_file(state, tmp_path / "model.safetensors")
    ledger = ledger_of(tmp_path)
    assert not ledger.notes()
    assert ledger.nominal == 8
    assert ledger.accounts["codes"] == 8 * ledger.weights
    layers = {linear.name.rpartition(".")[2]: linear for linear in ledger.linears}
    assert layers["q_proj"].stored == 8 * 48 * 48 + 32 * 48
    assert layers["up_proj"].stored == 8 * 72 * 48 + 8 * 72


def test_a_file_of_another_model_is_refused(tmp_path):
    folder = Path(shutil.copytree(STORED / "awq", tmp_path / "awq"))
    save_file({"something": torch.zeros(4)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of its 1 tensors is of a linear layer"):
        ledger_of(folder)


def test_a_pickle_that_would_run_code_is_refused_with_a_way_out(tiny_model, tmp_path):
    shutil.copy(tiny_model / "config.json", tmp_path)
    torch.save({"model.norm.weight": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"cannot be read as tensors alone.*safetensors"):
        ledger_of(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"bits": 4}, 4),
        ({"bits": 4, "extra_config": {"layer": {"bits": 8}}}, 8),
        ({"bits": 4, "dynamic": {"-:.*no.*": {}, "+:lay.*": {"bits": 2}}}, 2),
        ({"load_in_8bit": True}, 8),
        ({"quant_config": {"weight_quant_params": {"nbits": 3}}}, 3),
        ({"config_groups": {"a": {"weights": {"num_bits": 4}}}}, 4),
        ({"config_groups": {n: {"weights": {"num_bits": n}} for n in (4, 8)}}, None),
        ({"num_codebooks": 1, "nbits_per_codebook": 16, "in_group_size": 8}, 2),
        ({"quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, 4),
        ({"quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}}, 8),
        ({"quant_type": "int8_weight_only"}, 8),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "other"}, None),
    ],
)
def test_bits_of_a_code_as_owners_state_them(quantization, expected):
    assert code_bits(quantization, "layer") == expected


def test_bits_of_a_code_are_in_the_names_of_gguf_types():
    kinds = {"Q4_K": 4, "IQ2_XXS": 2, "F16": 16, "BF16": 16, "TQ1_0": 1, "MXFP4": 4, "I8": None}
    assert {kind: type_bits(kind) for kind in kinds} == kinds


def test_inspect_shows_bits_accounts_and_layers(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "140")
    picture = tmp_path / "columns.png"
    words = ["inspect", str(STORED / "gptq"), "--layers", "--plot", str(picture)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for text in (
        "auto-round 0.16.1",
        "permutations",
        "g_idx I32",
        "32 x 64",
        f"{bits('gptq'):.3f}",
    ):
        assert text in shown
    assert picture.is_file()


@pytest.mark.parametrize("text", ["", "GGUF", "GGUF" + "x" * 100])
def test_a_damaged_gguf_file_is_one_line(text, tmp_path, capsys):
    path = tmp_path / "damaged.gguf"
    path.write_text(text)
    assert main(["inspect", str(path)]) in (1, 2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("claq-exp: ")
    assert str(path) in line


def test_made_json_has_versions_and_logits():
    for name in NAMES:
        made = json.loads((STORED / name / "made.json").read_text())
        assert len(made["logits"]) == 16
        assert "transformers" in made["packages"]


def test_a_gguf_file_that_is_cut_short_is_one_line(tmp_path, capsys):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama(hidden_size=64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(["inspect", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "may be cut short" in line
