"""Mixtures of experts: fused weights taken apart and put back, routers, and idle experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantized_models import Quantized, quantized_model
from tiny_architectures import ARCHITECTURES, EXPERTS, token_batches
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from claq_exp.allocate.survey import survey_model
from claq_exp.errors import ConfigError
from claq_exp.models.blocks import capture_inputs
from claq_exp.models.discover import find_blocks, find_waves, linears_of
from claq_exp.models.experts import (
    SeparateExperts,
    expert_lists,
    fuse_experts,
    router_weights,
    split_experts,
)
from claq_exp.models.load import load_model
from claq_exp.models.stream import WholeModel
from claq_exp.payload import unpack_weight
from claq_exp.quantize.codebook import KMeans, Uniform
from claq_exp.quantize.precision import Fixed, OutlierOrder
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.reservation import OutlierOrder as ReservedOutliers
from claq_exp.quantize.solver import Gptq, Nearest

SIZES = {"hidden_size": 24, "num_attention_heads": 4, "vocab_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_key_value_heads": 2, "head_dim": 6, "moe_intermediate_size": 16}
SIZES |= {"intermediate_size": 40, "shared_expert_intermediate_size": 32, "pad_token_id": 0}
SIZES |= {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "minimax")
USED, IDLE = range(4), range(4, EXPERTS)
TOKENS = token_batches(1)[0]


def plain(kind: str) -> PreTrainedModel:
    """A model as transformers builds it, with weights that make experts differ."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def lazy_mixtral() -> PreTrainedModel:
    """A Mixtral that sends nothing to its last experts.

    The first four scores are a, -a, b, -b: two of them are positive, and beat the others' zero.
    """
    model = ARCHITECTURES["mixtral"].build()
    for block in model.model.layers:
        router = block.mlp.gate.weight.data
        router[1], router[3] = -router[0], -router[2]
        router[IDLE.start :] = 0
    return model


@pytest.mark.parametrize("kind", MIXTURES)
def test_separate_experts_compute_what_the_fused_ones_do(kind):
    model = plain(kind)
    expected = logits_of(model)
    split_experts(model)
    lists = [module for module in model.modules() if isinstance(module, SeparateExperts)]
    assert [len(experts) for experts in lists] == [8, 8]
    assert not [name for name, value in model.named_parameters() if value.ndim > 2]
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)


def test_separate_experts_share_the_memory_of_the_fused_weights():
    model = plain("mixtral")
    fused = model.model.layers[0].mlp.experts
    memory = {fused.gate_up_proj.untyped_storage().data_ptr()}
    memory.add(fused.down_proj.untyped_storage().data_ptr())
    split_experts(model)
    views = model.model.layers[0].mlp.experts.parameters()
    assert {view.untyped_storage().data_ptr() for view in views} == memory


@pytest.mark.parametrize("kind", MIXTURES)
def test_fused_again_they_are_what_they_were(kind):
    model = plain(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    split_experts(model)
    fuse_experts(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_fusing_takes_the_weights_as_they_are_now():
    model = plain("mixtral")
    split_experts(model)
    model.half()
    model.model.layers[1].mlp.experts[3].up_proj.weight.data.fill_(7)
    fuse_experts(model)
    experts = model.model.layers[1].mlp.experts
    assert experts.gate_up_proj.dtype == torch.float16
    assert (experts.gate_up_proj[3, 40:] == 7).all()
    assert not (experts.gate_up_proj[3, :40] == 7).any()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_folder_in_the_layout_of_the_hub_loads_with_separate_experts(kind, tmp_path: Path):
    model = plain(kind)
    model.save_pretrained(tmp_path)  # expert by expert, under the hub's names
    loaded = load_model(tmp_path, dtype="float32", device="cpu")
    assert [m for m in loaded.modules() if isinstance(m, SeparateExperts)]
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-4, atol=1e-5)


def test_experts_that_compute_something_else_are_refused_by_name():
    model = plain("gpt_oss")  # transposed, interleaved, with biases
    split_experts(model)
    _, blocks = find_blocks(model)
    with pytest.raises(ConfigError, match=r"mlp\.experts\.gate_up_proj \(8 x 24 x 80\).*looked"):
        linears_of(blocks[0])


@pytest.mark.parametrize("kind", MIXTURES)
def test_routers_are_no_linears_to_quantize(kind):
    model = plain(kind)
    split_experts(model)
    _, blocks = find_blocks(model)
    routers = router_weights(blocks[0])
    assert len(routers) == (2 if kind == "qwen2_moe" else 1)  # with its shared expert's gate
    assert not {f"{name}.weight" for name in linears_of(blocks[0])} & routers
    held = set(linears_of(blocks[0])) | {name.removesuffix(".weight") for name in routers}
    matrices = [name for name, value in blocks[0].named_parameters() if value.ndim > 1]
    assert held == {name.removesuffix(".weight") for name in matrices}


class HandMade(nn.Module):
    """A block as a model's own code may write it: a list of experts, a linear to route."""

    def __init__(self, layers: int, router_rows: int) -> None:
        super().__init__()
        self.key = nn.Linear(6, layers)  # as many rows as a router, but beside another matrix
        self.query = nn.Linear(6, 6)
        self.mixture = nn.Module()
        self.mixture.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))
        self.mixture.router = nn.Linear(6, router_rows)


def test_a_linear_that_scores_a_list_of_experts_is_a_router():
    block = HandMade(4, 4)
    assert list(expert_lists(block)) == ["mixture.experts"]
    assert router_weights(block) == {"mixture.router.weight"}
    assert "key" in linears_of(block)
    assert "mixture.router" not in linears_of(block)


def test_a_list_of_layers_without_a_router_is_no_list_of_experts():
    block = HandMade(4, 5)
    assert not expert_lists(block)
    assert not router_weights(block)
    assert "mixture.router" in linears_of(block)


def test_an_expert_that_the_first_batch_did_not_reach_has_the_groups_of_the_others():
    model = lazy_mixtral()
    _, blocks = find_blocks(model)
    inputs = capture_inputs(WholeModel(model), [TOKENS[:1, :2]])
    waves = find_waves(blocks[0], inputs[0])
    assert [len(wave) for wave in waves] == [1, 1, EXPERTS, EXPERTS]
    assert [group.names for group in waves[2]] == [
        (f"mlp.experts.{index}.gate_proj", f"mlp.experts.{index}.up_proj")
        for index in range(EXPERTS)
    ]


def quantized(model: PreTrainedModel, folder: Path, recipe: Recipe) -> Quantized:
    return quantized_model(model, token_batches(3, size=4), recipe, folder)


def test_a_block_of_experts_takes_as_many_passes_as_any_other(tmp_path):
    passes = {}
    for name in ("llama", "mixtral"):
        model = ARCHITECTURES[name].build()
        counted: list[int] = []
        model.model.layers[0].register_forward_pre_hook(lambda *_, seen=counted: seen.append(1))
        quantized(model, tmp_path / name, Recipe(KMeans(), Fixed(2), NoReservation(), Nearest()))
        passes[name] = len(counted)
    assert passes["mixtral"] == passes["llama"]


RECIPES = {
    "outlier order": Recipe(KMeans(), OutlierOrder(2.5), ReservedOutliers(0.02), Gptq()),
    "one codebook": Recipe(KMeans(shared=True), Fixed(3), NoReservation(), Gptq()),
    "uniform": Recipe(Uniform(), Fixed(3), NoReservation(), Gptq()),
    "nearest": Recipe(KMeans(), OutlierOrder(2.5), NoReservation(), Nearest()),
}


@pytest.mark.case(20, 52)
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_expert_that_saw_nothing_is_rounded_to_nearest(recipe, tmp_path):
    model, original = lazy_mixtral(), lazy_mixtral()
    result = quantized(model, tmp_path, RECIPES[recipe])
    assert list(result.packed) == ARCHITECTURES["mixtral"].linears()
    for row in result.report:
        _, _, place = row["name"].partition("experts.")
        idle = bool(place) and int(place[0]) in IDLE
        assert (row["tokens"] == 0) == idle, row["name"]
        assert (row["dead_columns"] == row["cols"]) == idle, row["name"]
        assert 0 < row["weight_error"] < 0.5
        packed = result.packed[row["name"]]
        dense = unpack_weight(packed.layout, packed.tensors).dequantize()
        before = original.get_submodule(row["name"]).weight
        if idle:  # no error was passed on, so that no entry is far from what it was
            assert (dense - before).abs().max() < 0.5 * before.abs().max()


def test_rows_tell_how_many_tokens_a_layer_saw(tmp_path):
    model = ARCHITECTURES["mixtral"].build()
    seen: list[int] = []
    model.model.layers[0].mlp.experts[2].register_forward_pre_hook(
        lambda _, args: seen.append(len(args[0]))
    )
    with torch.inference_mode():
        for batch in token_batches(3, size=4):
            model(batch, use_cache=False)
    first = ARCHITECTURES["mixtral"].build()
    frozen = Recipe(KMeans(), Fixed(8), NoReservation(), Nearest())  # routes as the original does
    rows = {row["name"]: row["tokens"] for row in quantized(first, tmp_path, frozen).report}
    place = "model.layers.0"
    assert rows[f"{place}.self_attn.q_proj"] == 3 * 4 * 12
    assert rows[f"{place}.mlp.experts.2.gate_proj"] == sum(seen)
    assert rows[f"{place}.mlp.experts.2.down_proj"] == sum(seen)
    sent = [rows[f"{place}.mlp.experts.{index}.up_proj"] for index in range(EXPERTS)]
    assert sum(sent) == 2 * 3 * 4 * 12


@pytest.mark.parametrize("gradients", [True, False])
def test_an_allocation_weighs_experts_by_the_tokens_they_see(gradients):
    model = lazy_mixtral()
    found = survey_model(model, token_batches(4, size=8), Gptq(), gradients=gradients)
    assert set(found) == set(ARCHITECTURES["mixtral"].linears())
    place = "model.layers.1.mlp.experts"
    for layer in ("gate_proj", "down_proj"):
        worth = [
            (
                found[f"{place}.{i}.{layer}"].distortion_weight.sum()
                * found[f"{place}.{i}.{layer}"].importance().sum()
            ).item()
            for i in range(EXPERTS)
        ]
        assert max(worth[i] for i in IDLE) < 0.25 * min(worth[i] for i in USED)
        assert min(worth) > 0
