"""claq-exp export format=compressed-tensors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from uniform_models import Q_PROJ, TOKENS, grid, unpacked, write, write_grids

from claq_exp.checkpoint.reader import load_model
from claq_exp.export import export

NAME = "compressed-tensors"


def read_back(stored: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    """A matrix of the layout, number by number: [out, in] float64."""
    rows, columns = stored[f"{name}.weight_shape"].tolist()
    scales = stored[f"{name}.weight_scale"]
    size = columns // scales.shape[1]
    codes = unpacked(stored[f"{name}.weight_packed"], bits, columns)
    zeros = unpacked(stored[f"{name}.weight_zero_point"].t(), bits, rows)
    return torch.tensor(
        [
            [
                float(scales[o, i // size]) * (codes[o][i] - zeros[i // size][o])
                for i in range(columns)
            ]
            for o in range(rows)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_number_is_read_back(bits, group_size, tmp_path):
    made = write_grids(tmp_path / "packed", bits, group_size)
    export(tmp_path / "packed", tmp_path / "new", NAME)
    stored = load_file(tmp_path / "new" / "model.safetensors")
    for name in (Q_PROJ, "model.layers.1.mlp.down_proj"):
        assert torch.equal(read_back(stored, name, bits), made[name].dequantize().double())
    config = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert group["weights"]["strategy"] == ("group" if group_size else "channel")
    assert config["ignore"] == ["lm_head"]


def mixed(name: str, module: torch.nn.Linear):
    """Widths and group sizes of their own for attention and MLP."""
    bits, size = (4, 32) if "self_attn" in name else (3, 0)
    return grid(module.out_features, module.in_features, bits, size)


def test_layers_of_other_kinds_are_named(tmp_path):
    made = write(tmp_path / "packed", mixed)
    export(tmp_path / "packed", tmp_path / "new", NAME)
    config = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    for group in config["config_groups"].values():
        bits = group["weights"]["num_bits"]
        assert set(group["targets"]) == {n for n, w in made.items() if w.column_bits[0] == bits}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_reads_equal_weights(bits, tmp_path):
    """With `dequantize`: else release 0.20.1 of the package expects zero points unpacked."""
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    write_grids(tmp_path / "packed", bits)
    export(tmp_path / "packed", tmp_path / "new", NAME, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "new",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    expected = load_model(tmp_path / "packed")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_package_decompresses_equal_weights(dtype, tmp_path):
    """Layers of two kinds, each by its own settings, as engines do."""
    package = pytest.importorskip("compressed_tensors.compressors", exc_type=ImportError)
    from compressed_tensors.quantization import QuantizationConfig

    made = write(tmp_path / "packed", mixed)
    export(tmp_path / "packed", tmp_path / "new", NAME, dtype=dtype)
    stored = load_file(tmp_path / "new" / "model.safetensors")
    config = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    compressor = package.BaseCompressor.get_value_from_registry("pack-quantized")
    for scheme in QuantizationConfig.model_validate(config).config_groups.values():
        for name in scheme.targets:
            own = {s: stored[f"{name}.{s}"] for s in compressor.compression_param_names(scheme)}
            found = compressor.decompress(own, scheme)["weight"]
            assert torch.equal(found, made[name].dequantize().to(getattr(torch, dtype))), name
