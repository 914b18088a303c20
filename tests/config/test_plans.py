"""A plan lays out every linear layer by its shape and, where a rule asks for it, by its name."""

from __future__ import annotations

import pytest
from conftest import tiny_llama
from transformers import MixtralConfig

import claq_exp.quantize.recipe
import claq_exp.run.shape
from claq_exp.compose.experiment import compose_config
from claq_exp.quantize.recipe import planned_layout
from claq_exp.run.plan import Plan, make_plan
from claq_exp.system.machine import matmul_speed


def plan(*words: str) -> Plan:
    config = compose_config(["evaluation.context=64", *words])
    return make_plan(config, tiny_llama().config, "cpu")


@pytest.fixture
def planned(monkeypatch) -> list[str]:
    """The layers that were planned themselves."""
    names: list[str] = []

    def counted(recipe, rows, columns, name=""):
        names.append(name)
        return planned_layout(recipe, rows, columns, name)

    monkeypatch.setattr(claq_exp.quantize.recipe, "planned_layout", counted)
    return names


def test_layers_of_one_shape_are_planned_once(planned):
    layouts = plan().layouts
    assert len(layouts) == 3 * 7
    shapes = {(layout.rows, layout.columns) for layout in layouts.values()}
    assert len(planned) == len(shapes) == 4


def test_a_layer_map_is_planned_once_for_each_shape_and_width(planned):
    chosen = "+precision.widths={layers.0.*:8,down_proj:2}"
    layouts = plan("precision=layer_map", "precision.default=3", chosen).layouts
    for name, layout in layouts.items():
        expected = 8 if ".0." in name else 2 if name.endswith("down_proj") else 3
        assert layout.widths() == {expected: layout.columns}, name
    assert len(planned) == 2 * 4


def test_a_mixture_of_experts_takes_the_time_of_the_experts_that_run():
    sizes = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "head_dim": 12}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8}

    def planned_for(experts: int) -> Plan:
        config = compose_config(["evaluation.context=64", "evaluation.zero_shot={}"])
        return make_plan(config, MixtralConfig(**sizes, num_experts_per_tok=experts), "cpu")

    two, all_of_them = planned_for(2), planned_for(8)
    assert two.parameters == all_of_them.parameters
    assert len(two.layouts) == 2 * (4 + 8 * 3)
    assert not [name for name in two.layouts if name.endswith("mlp.gate")]
    assert two.sizes == all_of_them.sizes
    assert two.seconds["quantize"] < all_of_them.seconds["quantize"]


def test_a_slow_codebook_takes_longer_to_plan_for():
    usual = plan("experiment=claq_2.12").seconds["quantize"]
    assert plan("experiment=claq_2.12", "codebook=sklearn_kmeans").seconds["quantize"] > 1.5 * usual


def test_times_follow_the_speed_of_the_machine(monkeypatch):
    speed = matmul_speed("cpu")
    assert 1e8 < speed < 1e14
    seconds = []
    for factor in (1, 1000):
        measured = factor * speed
        monkeypatch.setattr(
            claq_exp.run.shape, "matmul_speed", lambda device, found=measured: found
        )
        seconds.append(plan("evaluation=perplexity").seconds["evaluate original"])
    assert seconds[0] == pytest.approx(1000 * seconds[1])
