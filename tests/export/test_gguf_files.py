"""claq-exp export format=gguf."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_words
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from uniform_models import Q_PROJ, TOKENS, grid, write, write_grids

from claq_exp.checkpoint.manifest import write_manifest
from claq_exp.checkpoint.reader import load_model
from claq_exp.cli import main
from claq_exp.errors import ConfigError
from claq_exp.export import export
from claq_exp.export.gguf_vocabulary import SPLITS
from claq_exp.models.gguf import _gguf_options
from claq_exp.system.files import read_json, write_json

TEXT = "the small dog sees a big red house, and it's 42."


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "packed"
    write_grids(folder, 4)
    with_tokenizer(folder, byte_level())
    return folder


def with_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Put another tokenizer into a checkpoint."""
    tokenizer.save_pretrained(folder)
    (folder / "manifest.json").unlink()
    write_manifest(folder)


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that merges some letters, of 256 tokens in all."""
    merges = [("h", "e"), ("t", "he"), ("Ġ", "the"), ("o", "g"), ("Ġ", "d")]
    alphabet = [a for a in sorted(pre_tokenizers.ByteLevel.alphabet()) if a not in "ÀÁÂÃÄ"]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[0])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_transformers_reads_equal_weights(dtype, packed, tmp_path, capsys):
    target = tmp_path / "model.gguf"
    assert main(["export", str(packed), str(target), "format=gguf", f"dtype={dtype}"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors}
    assert kinds == {"F32"} | ({"F16"} if dtype == "float16" else set())
    place = {"pretrained_model_name_or_path": tmp_path, "gguf_file": target.name}
    found = AutoModelForCausalLM.from_pretrained(**place, **_gguf_options(), dtype=torch.float32)
    expected = load_model(packed, dtype=dtype).float()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    with torch.inference_mode():
        torch.testing.assert_close(found(TOKENS).logits, expected(TOKENS).logits)
    own, read = AutoTokenizer.from_pretrained(packed), AutoTokenizer.from_pretrained(**place)
    assert read(TEXT).input_ids == own(TEXT).input_ids


def test_an_original_is_written_by_the_script_for_peers(
    tiny_model, text_file, tmp_path, monkeypatch
):
    folder, target = tmp_path / "tiny", tmp_path / "tiny.gguf"
    shutil.copytree(tiny_model, folder)
    byte_level().save_pretrained(folder)
    monkeypatch.setattr(sys, "argv", ["as_gguf.py", str(target), *tiny_words(folder, text_file)])
    script = Path(__file__).parents[2] / "examples" / "peers" / "as_gguf.py"
    runpy.run_path(str(script), run_name="__main__")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    weight = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert np.array_equal(tensors["blk.1.ffn_up.weight"].data, weight.half().numpy())
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_rows_of_q_and_k_are_in_the_order_of_llama_cpp(packed, tmp_path):
    """As `LlamaModel.permute` of convert_hf_to_gguf.py, written as single rows."""
    export(packed, tmp_path / "model.gguf", "gguf", dtype="float32")
    weight = load_model(packed).get_submodule(Q_PROJ).weight.detach().numpy()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    found, heads = tensors["blk.0.attn_q.weight"].data, 4
    size = len(weight) // heads
    for row in range(len(weight)):
        head, place = divmod(row, size)
        pair, half = divmod(place, 2)
        assert np.array_equal(found[row], weight[head * size + half * size // 2 + pair])


def test_matrices_in_blocks_are_as_the_gguf_package_rounds_them(packed, tmp_path):
    export(packed, tmp_path / "model.gguf", "gguf", dtype="q8_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    weight = load_model(packed).get_submodule("model.layers.0.mlp.up_proj").weight.detach()
    found = tensors["blk.0.ffn_up.weight"]
    assert found.tensor_type.name == "Q8_0"
    kind = gguf.GGMLQuantizationType.Q8_0
    assert np.array_equal(found.data, gguf.quantize(weight.numpy(), kind))
    step = np.abs(weight.numpy().reshape(len(weight), -1, 32)).max(axis=2, keepdims=True) / 127
    error = np.abs(gguf.dequantize(found.data, kind) - weight.numpy())
    assert (error.reshape(len(weight), -1, 32) <= 0.57 * step).all()
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """BPE with byte fallback and a space in front, as Llama 2's."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("e", "d"), ("h", "e"), ("t", "he"), ("▁", "the"), ("d", "o"), ("do", "g")]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokens += ["".join(pair) for pair in merges] + letters
    backend = Tokenizer(
        BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_a_sentencepiece_like_tokenizer_is_read_back(packed, tmp_path):
    write(
        tmp_path / "other",
        lambda _, m: grid(m.out_features, m.in_features, 4),
        vocab_size=300,
    )
    with_tokenizer(tmp_path / "other", sentencepiece_like())
    export(tmp_path / "other", tmp_path / "model.gguf", "gguf")
    own = AutoTokenizer.from_pretrained(tmp_path / "other")
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in (TEXT, "dogs hedged the thed", "Ünïcode"):
        assert read(text, add_special_tokens=False).input_ids == own(text).input_ids
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert len(fields["tokenizer.ggml.tokens"].data) == 300  # the last are padding
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_another_rotary_embedding_is_refused(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    write_json(
        folder / "config.json", {**read_json(folder / "config.json"), "rope_parameters": rope}
    )
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(ConfigError, match="does not write the rotary embedding 'linear'"):
        export(folder, tmp_path / "model.gguf", "gguf")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (byte_tokenizer, "it has no merges"),
        (lambda: split_by("[a-z]+"), "how it splits text is not known"),
    ],
)
def test_a_tokenizer_without_a_name_is_refused(kind, said, packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    with_tokenizer(folder, kind())
    with pytest.raises(ConfigError, match=f"{said}.*convert_hf_to_gguf.py"):
        export(folder, tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()


def split_by(pattern: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that splits text by a pattern first."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


@pytest.mark.parametrize(("pattern", "name"), SPLITS.items())
def test_known_ways_to_split_text_are_named(pattern, name, packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    with_tokenizer(folder, split_by(pattern))
    export(folder, tmp_path / "model.gguf", "gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    own, read = (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"),
    )
    for text in (TEXT, "1234567 dogs\n\n  the"):
        assert read(text).input_ids == own(text).input_ids


def test_a_target_must_end_like_a_file(packed, tmp_path):
    with pytest.raises(ConfigError, match="let it end in"):
        export(packed, tmp_path / "model", "gguf")
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        export(packed, tmp_path / "model.gguf", "gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_a_failure_leaves_nothing(packed, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space"):
        export(packed, tmp_path / "model.gguf", "gguf")
    assert list(tmp_path.iterdir()) == []
