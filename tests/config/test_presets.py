"""Every preset of conf/experiment is the row that its name and its first comment say."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import yaml

from claq_exp.compose.experiment import compose_config
from claq_exp.compose.options import groups
from claq_exp.config import ExperimentConfig
from claq_exp.errors import ConfigError
from claq_exp.payload.base import Layout
from claq_exp.quantize.budget import BudgetConfig, fit_budget
from claq_exp.quantize.recipe import planned_layout, planned_layouts

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "experiment"
PRESETS = groups()["experiment"]
REFERENCE = [name for name in PRESETS if name.startswith("claq_reference/")]
FITTED = [name for name in PRESETS if name.startswith("linear/or_")]  # by their share alone
LINEAR = [
    name
    for name in PRESETS
    if name.startswith(("linear/", "best/")) and name not in FITTED and not name.endswith("bit")
]
ROUNDED = [name for name in PRESETS if re.match(r"w\d+a\d+/", name)]
OWN = [name for name in PRESETS if name not in REFERENCE + LINEAR + FITTED + ROUNDED]
DEFAULT_BLOCK = [(576, 576), (192, 576), (192, 576), (576, 576), *[(1536, 576)] * 2, (576, 1536)]
SMALL_LLAMA = {  # the shapes of some blocks of SmolLM2-135M
    f"{block}.{number}": shape for block in range(6) for number, shape in enumerate(DEFAULT_BLOCK)
}
SIDE = 4096
PUBLISHED = {  # LLaMA-1-7B, WikiText-2: CLAQ's and GPTQ's tables
    "kmeans_3bit": 6.47,
    "kmeans_4bit": 5.78,
    "claq_2.12": 7.57,
    "claq_3.12": 5.97,
    "claq_reference/2.12": 7.57,
    "claq_reference/3.12": 5.97,
    "claq_reference/3bit": 6.47,
    "claq_reference/4bit": 5.78,
    "gptq_3bit": 8.07,
    "gptq_4bit": 6.09,
    "gptq_3bit_g128": 6.61,
    "rtn_3bit": 25.54,
    "rtn_4bit": 6.29,
}


@functools.cache
def preset(name: str) -> ExperimentConfig:
    return compose_config([f"experiment={name}"])


@functools.cache
def layout_of(name: str) -> Layout:
    return planned_layout(preset(name).recipe(), SIDE, SIDE)


def bits_in_name(name: str) -> float:
    return float(re.search(r"[_/](\d(?:\.\d+)?)(?:bit|$)", name)[1])


@pytest.mark.parametrize("name", OWN)
def test_the_nominal_bits_are_those_of_the_name(name):
    assert layout_of(name).nominal_bits() == pytest.approx(bits_in_name(name), abs=0.01)
    grouped = re.search(r"_g(\d+)", name)
    if name.startswith(("gptq", "rtn")):
        assert layout_of(name).group_size == (int(grouped[1]) if grouped else SIDE)


@pytest.mark.parametrize("name", LINEAR)
def test_the_linear_bits_are_close_below_those_of_the_name(name):
    config = preset(name)
    assert config.budget == BudgetConfig(bits_in_name(name), "linear")
    recipe = fit_budget(config.recipe(), config.budget, SMALL_LLAMA, lambda _: 0.0)
    allocation = config.allocation_rule().within(config.budget)
    layouts = allocation.planned_layouts(recipe, SMALL_LLAMA, lambda _: 0.0).values()
    stored = sum(layout.ledger().total for layout in layouts)
    bits = stored / sum(layout.weights for layout in layouts)
    assert bits_in_name(name) - 0.01 < bits <= bits_in_name(name)


@pytest.mark.parametrize("name", FITTED)
def test_a_share_that_was_fitted_to_the_default_model_is_close_below_the_bits_of_the_name(name):
    shapes = {str(number): shape for number, shape in enumerate(DEFAULT_BLOCK)}
    layouts = planned_layouts(preset(name).recipe(), shapes).values()
    stored = sum(layout.ledger().total for layout in layouts)
    bits = stored / sum(layout.weights for layout in layouts)
    assert bits_in_name(name) - 0.02 < bits <= bits_in_name(name)  # the header is not in it


@pytest.mark.parametrize("name", ROUNDED)
def test_a_preset_of_weights_and_activations_has_the_bits_of_its_name(name):
    weights, activations = re.match(r"w(\d+)a(\d+)/", name).groups()
    assert layout_of(name).nominal_bits() == pytest.approx(int(weights))
    block_format = preset(name).activation_rule().block_format()
    assert (16 if block_format is None else block_format.bits) == int(activations)
    if name.startswith("w4a4/") and "claq" not in name:
        kind = preset(name).codebook["name"]
        assert preset(name).activation["name"] == {"uniform": "int"}.get(kind, kind)
        if layout_of(name).kind == "block_format":
            assert layout_of(name).block_format == block_format


@pytest.mark.parametrize("name", REFERENCE)
def test_a_preset_of_the_reference_has_the_columns_and_the_share_of_its_formulas(name):
    target = {2.12: 2.05, 2.24: 2.1, 3.12: 3.05, 3.23: 3.1}.get(bits_in_name(name))
    share = 0.0
    if target is not None:  # without an outlier above 13 means, the first block takes it all
        share = (round(SIDE * 0.014) + 1 + SIDE - round(SIDE * 0.986)) / SIDE
        assert share == pytest.approx(0.02808, abs=1e-5)
    code_bits = target or bits_in_name(name)
    layout = layout_of(name)
    assert layout.reserved == share * SIDE * SIDE
    low, part = (2, (code_bits - 2) / 2) if code_bits < 3 else (3, code_bits - 3)
    high = round(SIDE * part)
    expected = {low: SIDE - high, 4: high}
    assert layout.widths() == {bits: columns for bits, columns in expected.items() if columns}
    mean = sum(bits * columns for bits, columns in expected.items()) / SIDE
    assert layout.nominal_bits() == pytest.approx(mean + share * (16 - mean))


@pytest.mark.parametrize("name", REFERENCE)
def test_a_preset_of_the_reference_is_the_reference_in_every_family(name):
    config = preset(name)
    assert config.codebook == {"name": "sklearn_kmeans", "seed": 10, "fit_reserved": True}
    assert config.precision["name"] in {"claq_reference", "fixed"}
    assert config.reservation["name"] in {"claq_reference", "none"}
    gptq = {"name": "gptq", "act_order": True, "block_size": 128, "damping": 0.01}
    assert gptq.items() <= config.solver.items()


@pytest.mark.parametrize("name", PRESETS)
def test_the_first_comment_says_the_row_and_what_was_published(name):
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    assert re.fullmatch(r"# [A-Z'k].*\.", lines[1])
    found = [float(m[1]) for m in (re.search(r"WikiText-2: (\S+) ", line) for line in lines) if m]
    assert found == ([PUBLISHED[name]] if name in PUBLISHED else [])


def test_no_two_presets_are_the_same_recipe():
    recipes = {
        name: repr((preset(name).recipe(), preset(name).budget, preset(name).activation))
        for name in PRESETS
    }
    assert len(set(recipes.values())) == len(recipes)


def test_the_default_recipe_has_a_preset():
    assert compose_config([]).recipe() == compose_config(["experiment=claq_3.56"]).recipe()


def test_every_preset_that_a_sweep_names_exists():
    sweeps = FOLDER.parents[1] / "sweeps"
    for path in sweeps.glob("*.yaml"):
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]["sweeper"]["params"]
        named = params.get("experiment", "")
        assert {name for name in named.split(",") if name} <= set(PRESETS)


def test_an_unknown_preset_in_a_folder_is_refused_with_those_there_are():
    with pytest.raises(
        ConfigError, match=r"claq_reference/9: no such option.*claq_reference/2\.12"
    ):
        compose_config(["experiment=claq_reference/9"])
