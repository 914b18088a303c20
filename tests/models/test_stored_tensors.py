"""What a folder's tensors say beside its config: ties, types, leftovers, and numbers too large."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

from claq_exp.errors import ConfigError, NumericalError, SourceError
from claq_exp.models.load import load_model, look_at, open_model, stored_dtype
from claq_exp.models.original import Original, check_strictly
from claq_exp.models.skeleton import tied_names

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, whose head is its embedding, that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(folder: Path, edit: Callable[[Tensors], object], **config: object) -> Path:
    """Edit the stored tensors, and set entries of config.json; None takes one out."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    path = folder / "config.json"
    data = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return folder


def all_as(dtype: torch.dtype) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()})


def own_head(tensors: Tensors) -> None:
    tensors[HEAD] = torch.randn(256, 48, generator=torch.Generator().manual_seed(1)).half()


def in_shards(folder: Path) -> Path:
    """Put each tensor of a folder into a file of its own."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {key: f"part-{number}.safetensors" for number, key in enumerate(tensors)}
    for key, name in places.items():
        save_file({key: tensors[key]}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same_as_theirs(folder: Path, tolerance: float = 0.0) -> Original:
    """Compare the model with that of transformers, its ties too, and return what is known."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(folder, dtype="float32", device="cpu")
    tokens = torch.arange(3, 15)[None]
    with torch.inference_mode():
        expected, found = (model(tokens).logits for model in (theirs, ours))
    assert torch.allclose(found, expected, rtol=0, atol=tolerance)
    assert tied_names(ours) == theirs.all_tied_weights_keys
    return look_at(folder)


@pytest.mark.case(106)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_a_head_stored_unlike_the_embedding_is_not_tied(shards, folder):
    change(folder, own_head)
    found = same_as_theirs(in_shards(folder) if shards else folder)
    assert found.untied == (HEAD,)
    assert not found.config.tie_word_embeddings
    assert "untied, as transformers loads it" in found.remarks()[0]
    check_strictly(found)  # the right model is no loss


@pytest.mark.case(106)
@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_head_of_a_multimodal_model_is_found_under_the_names_of_older_releases(name, tmp_path):
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = Gemma3Config(
        text_config={**SIZES, "sliding_window": 16, "tie_word_embeddings": True},
        vision_config={**vision, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert same_as_theirs(tmp_path).untied == ()
    change(tmp_path, lambda tensors: tensors.update({name: torch.randn(64, 24)}))
    found = same_as_theirs(tmp_path)
    assert found.untied == (HEAD,)
    assert not found.config.tie_word_embeddings
    assert found.unused == ()


@pytest.mark.case(106)
def test_a_head_beside_experts_that_must_be_converted_is_not_tied_either(tmp_path):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, tie_word_embeddings=True)).save_pretrained(tmp_path)
    bias = "model.layers.0.self_attn.q_proj.bias"
    own = {HEAD: torch.randn(64, 24), bias: torch.zeros(24)}
    change(tmp_path, lambda tensors: tensors.update(own))
    found = same_as_theirs(tmp_path, tolerance=1e-4)
    assert found.untied == (HEAD,)
    assert found.unused == (bias,)


@pytest.mark.case(107)
@pytest.mark.parametrize("form", ["both", "both in shards", "head alone", "other type"])
def test_members_of_a_tie_that_are_equal_or_stored_once_are_tied(form, folder):
    def edit(tensors: Tensors) -> None:
        embedding = tensors.pop(EMBEDDING) if form == "head alone" else tensors[EMBEDDING]
        tensors[HEAD] = embedding.float() if form == "other type" else embedding.clone()

    change(folder, edit)
    found = same_as_theirs(in_shards(folder) if form == "both in shards" else folder)
    assert (found.untied, found.unused) == ((), ())
    assert found.config.tie_word_embeddings


@pytest.mark.case(107)
def test_a_head_that_nothing_gives_is_refused_with_what_may_be_meant(folder):
    change(folder, lambda tensors: None, tie_word_embeddings=False)
    with pytest.raises(SourceError, match=r'e\.g\. lm_head\.weight; .*"tie_word_embeddings": true'):
        load_model(folder, dtype="float32", device="cpu")


LOST = {
    "model.layers.0.self_attn.q_proj.bias": [48],
    "model.layers.1.self_attn.q_norm.weight": [12],
    "model.layers.0.self_attn.q_proj.lora_A.weight": [4, 48],
    "model.layers.3.mlp.up_proj.weight": [72, 48],
    "lm_head.bias": [256],
    "model.embed_positions.weight": [128, 48],
    "model.layers.0.vision.weight": [4, 4],
}


@pytest.mark.case(108)
@pytest.mark.parametrize("name", LOST)
def test_a_stored_tensor_that_no_parameter_takes_is_told(name, folder):
    change(folder, lambda tensors: tensors.update({name: torch.ones(LOST[name])}))
    found = look_at(folder)
    assert found.unused == (name,)
    assert found.as_dict()["unused_examples"] == [name]
    assert "1 stored tensor has no place in the model of config.json" in found.remarks()[0]
    with pytest.raises(SourceError, match=f"strict=true, and 1 stored tensor has .*{name}"):
        check_strictly(found)


MISSED_BY_NOBODY = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": [6],
    "model.layers.0.self_attn.masked_bias": [],
    "model.embeddings.position_ids": [1, 128],
    "vision_tower.vision_model.layers.0.self_attn.q_proj.weight": [4, 4],
    "model.visual.blocks.0.attn.qkv.weight": [4, 4],
    "multi_modal_projector.linear_1.weight": [4, 4],
    "mtp.layers.0.self_attn.q_proj.weight": [4, 4],
    "score.weight": [2, 48],
}


@pytest.mark.case(109)
@pytest.mark.parametrize("name", MISSED_BY_NOBODY)
def test_what_is_computed_or_belongs_to_no_text_model_is_not_told(name, folder):
    change(folder, lambda tensors: tensors.update({name: torch.ones(MISSED_BY_NOBODY[name])}))
    assert (look_at(folder).unused, look_at(folder).remarks()) == ((), [])


@pytest.mark.case(115)
def test_an_adapter_beside_the_model_is_told_and_not_applied(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "its adapter is not applied" in look_at(folder).remarks()[0]
    with pytest.raises(SourceError, match=r"strict=true, and adapter_config\.json"):
        check_strictly(look_at(folder))


@pytest.mark.case(110)
@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
    ],
)
def test_without_a_dtype_in_the_config_that_of_the_tensors_counts(stored, kept, folder, tmp_path):
    change(folder, all_as(stored), dtype=None)
    assert stored_dtype(look_at(folder).config) == kept
    told: list[Original] = []
    open_model(folder, tmp_path, dtype="float32", device="cpu", found=told.append)
    assert stored_dtype(told[0].config) == kept  # whatever it was opened in


@pytest.mark.case(110)
def test_of_mixed_types_that_of_most_numbers_counts_and_the_configs_word_before(folder):
    def edit(tensors: Tensors) -> None:
        all_as(torch.bfloat16)(tensors)
        tensors[NORM] = tensors[NORM].float()

    change(folder, edit, dtype=None)
    assert stored_dtype(look_at(folder).config) == torch.bfloat16
    change(folder, lambda tensors: None, dtype="float32")
    assert stored_dtype(look_at(folder).config) == torch.float32


def set_to(name: str, value: float, dtype: torch.dtype) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        all_as(dtype)(tensors)
        tensors[name].view(-1)[3] = value

    return edit


@pytest.mark.case(111)
@pytest.mark.parametrize(
    ("edit", "config", "run_in", "words"),
    [
        (
            set_to(NORM, 2.0**18, torch.bfloat16),
            "float16",
            "float32",
            r'model\.norm\.weight\[3\] is 262144, beyond float16, .*"dtype": "bfloat16" into',
        ),
        (
            set_to(EMBEDDING, -1e6, torch.float32),
            "float16",
            "float32",
            r'embed_tokens\.weight\[0, 3\] is -1e\+06, .*"dtype": "float32" into .*config\.json',
        ),
        (
            set_to(NORM, 2.0**18, torch.bfloat16),
            "bfloat16",
            "float16",
            r"norm\.weight\[3\] is 262144, beyond float16, which model\.dtype=float16 asks",
        ),
        (
            set_to(UP, 1e6, torch.float32),
            "float32",
            "float32",
            r"up_proj\.weight\[0, 3\] is 1e\+06, beyond float16, in which levels and outliers",
        ),
        (
            set_to(NORM, 1e39, torch.float64),
            "float32",
            "float32",
            r"norm\.weight\[3\] is 1e\+39, beyond float32, .*rescale",
        ),
        (
            set_to(NORM, float("inf"), torch.float16),
            "float16",
            "float32",
            r"norm\.weight\[3\] is inf; repair",
        ),
    ],
    ids=["kept bf16", "kept f32", "forward pass", "packed", "float64", "infinite"],
)
def test_a_number_beyond_a_type_that_it_meets_is_refused_by_name(
    edit, config, run_in, words, folder
):
    change(folder, edit, dtype=config)
    with pytest.raises(NumericalError, match=words) as caught:
        load_model(folder, dtype=run_in, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.case(111)
@pytest.mark.parametrize("name", [EMBEDDING, UP])
def test_numbers_too_small_for_float16_are_told(name, folder, tmp_path):
    def edit(tensors: Tensors) -> None:
        all_as(torch.float32)(tensors)
        tensors[name] *= 1e-8

    change(folder, edit)
    told: list[Original] = []
    open_model(folder, tmp_path, dtype="float32", device="cpu", found=told.append)
    assert told[0].too_small == (name,)
    with pytest.raises(SourceError, match=f"1 tensor holds numbers that are too small .*{name}"):
        check_strictly(told[0])


def beside(suffix: str, *shape: int, dtype: torch.dtype = torch.int32) -> Callable[[Tensors], None]:
    """Store a quantizer's tensor beside a weight."""
    return lambda tensors: tensors.update(
        {UP.removesuffix("weight") + suffix: torch.zeros(shape, dtype=dtype)}
    )


def as_type(dtype: torch.dtype) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({UP: tensors[UP].to(dtype)})


@pytest.mark.case(112)
@pytest.mark.parametrize(
    "edit",
    [
        beside("qweight", 6, 72),
        beside("g_idx", 48),
        beside("weight_packed", 72, 6),
        beside("weight_scale_inv", 1, 1, dtype=torch.float32),
        beside("SCB", 72, dtype=torch.float32),
        beside("weight.quant_state.bitsandbytes__nf4", 7, dtype=torch.uint8),
        as_type(torch.float8_e4m3fn),
        as_type(torch.int8),
        as_type(torch.bool),
    ],
    ids=["gptq", "order", "packed", "float8 scale", "int8 scale", "nf4", "float8", "int8", "bool"],
)
def test_what_another_quantizer_left_is_refused_without_a_word_in_the_config(edit, folder):
    change(folder, edit)
    with pytest.raises(ConfigError, match=r"already quantized.*give the original") as caught:
        look_at(folder)
    assert "model.layers.0.mlp.up_proj" in str(caught.value)


@pytest.mark.case(112)
def test_a_quantized_text_model_of_a_larger_config_is_refused(folder):
    change(folder, lambda tensors: None, compression_config={"quant_method": "compressed-tensors"})
    with pytest.raises(ConfigError, match="already quantized"):
        look_at(folder)
