"""Inputs of linear layers: who rounds them, how often, and what is seen of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_architectures import ARCHITECTURES, token_batches

from claq_exp.models.activations import observe_inputs, round_inputs
from claq_exp.models.discover import linears_of
from claq_exp.models.stream import WholeModel
from claq_exp.quantize.activation import ACTIVATION, Int, LoBcq, NoActivation, NvFp4
from claq_exp.quantize.activation.rounding import (
    Rounding,
    expected_rounding,
    needs_text,
    settle_rounding,
)

BATCHES = token_batches(2, size=3)


def linears(model: WholeModel) -> list[str]:
    return [
        f"{model.path}.{index}.{name}"
        for index, block in enumerate(model.blocks)
        for name in linears_of(block)
    ]


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(BATCHES[0], use_cache=False).logits


@pytest.fixture(scope="module")
def llama():
    return ARCHITECTURES["llama"].build().float().eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_observed_is_what_enters(architecture):
    model = ARCHITECTURES[architecture].build().float().eval()
    whole = WholeModel(model)
    names = linears(whole)
    observed = observe_inputs(whole, BATCHES, names)
    expected: dict[str, float] = {}

    def note(name):
        def hook(_, inputs):
            if inputs[0].numel():
                largest = float(inputs[0].abs().max())
                expected[name] = max(expected.get(name, 0.0), largest)

        return hook

    hooks = [model.get_submodule(n).register_forward_pre_hook(note(n)) for n in names]
    with torch.inference_mode():
        for batch in BATCHES:
            model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert set(observed.maxima) == set(names)
    assert {name: observed.maxima[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert observed.samples


@pytest.mark.parametrize("name", ACTIVATION)
def test_rules_round_a_model_and_come_back_from_json(llama, name):
    rule = ACTIVATION[name]()
    assert not needs_text(rule)
    rounding = settle_rounding(rule, None)
    if name == "none":
        assert rounding is None
        return
    again = Rounding.from_json(rounding.to_json(), ["x"])
    assert again.to_json() == rounding.to_json()
    values = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.round(values), rounding.round(values))
    model = copy.deepcopy(llama)
    round_inputs(model, rounding, linears(WholeModel(model)))
    error = (logits(model) - logits(llama)).square().mean() / logits(llama).square().mean()
    assert 0 < error < 0.5


def test_without_a_rule_logits_are_the_same_to_the_bit(llama):
    model = copy.deepcopy(llama)
    round_inputs(model, settle_rounding(NoActivation(), None), linears(WholeModel(model)))
    assert torch.equal(logits(model), logits(llama))


def test_an_input_that_layers_share_is_rounded_once(llama, monkeypatch):
    model = copy.deepcopy(llama)
    whole = WholeModel(model)
    rounding, seen = settle_rounding(NvFp4(), None), []
    original = Rounding.round
    monkeypatch.setattr(
        Rounding, "round", lambda self, x, limit=None: seen.append(x) or original(self, x, limit)
    )
    round_inputs(model, rounding, linears(whole))
    logits(model)
    assert len(seen) == 4 * len(whole.blocks)  # q, k and v; o; gate and up; down


def test_a_rounded_model_can_be_copied_and_pickled(llama):
    model = copy.deepcopy(llama)
    round_inputs(model, settle_rounding(LoBcq(), None), linears(WholeModel(model)))
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


def test_static_scales_follow_from_the_text_and_do_not_depend_on_the_batch(llama):
    whole = WholeModel(llama)
    rule = Int(bits=8, scope="static")
    assert needs_text(rule)
    observed = observe_inputs(whole, BATCHES, linears(whole))
    rounding = settle_rounding(rule, observed)
    model = copy.deepcopy(llama)
    round_inputs(model, rounding, linears(whole))
    entering: dict[str, torch.Tensor] = {}
    for name in linears(whole):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: entering.update({name: inputs[0]})
        )
    logits(model)
    for name, values in entering.items():
        limit = rounding.limit(name)
        assert limit == observed.maxima[name]
        assert torch.equal(rounding.round(values, limit), values)  # it is on that grid already
        others = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)) * limit
        together = rounding.round(others, limit)
        assert not torch.equal(together, others)
        assert torch.equal(rounding.round(others[:1], limit), together[:1])
    assert set(entering) == set(linears(whole))
    planned = expected_rounding(rule, linears(whole))
    assert planned.to_json().keys() == rounding.to_json().keys()
    assert planned.maxima.keys() == rounding.maxima.keys()


def test_codebooks_of_the_text_suit_it_better_than_those_of_noise(llama):
    whole = WholeModel(llama)
    observed = observe_inputs(whole, BATCHES, linears(whole))
    local = settle_rounding(LoBcq(array=16, codebooks=4, books="local"), observed)
    noise = settle_rounding(
        LoBcq(array=16, codebooks=4, books="local"),
        type(observed)({}, (torch.rand(64, 128, generator=torch.Generator().manual_seed(1)),)),
    )

    def error(rounding):
        misses = [(x - rounding.round(x)).square().sum() for x in observed.samples]
        return float(sum(misses))

    assert error(local) < error(noise)


@pytest.mark.case(120)
def test_gradients_pass_through_rounded_inputs(llama):
    model = copy.deepcopy(llama).requires_grad_(False)
    round_inputs(model, settle_rounding(NvFp4(), None), linears(WholeModel(model)))
    table = model.get_input_embeddings().weight.requires_grad_()
    plain = model(BATCHES[0], use_cache=False).logits
    assert torch.equal(plain.detach(), logits(model))
    plain.square().sum().backward()
    assert (table.grad[BATCHES[0].unique()].abs().sum(dim=1) > 0).all()
    layer = model.model.layers[0].mlp.down_proj
    inputs = torch.randn(2, layer.in_features, requires_grad=True)
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, layer.weight.sum(dim=0).expand(2, -1))
