"""What is measured of the original model, against autograd and Hessians done by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_architectures import ARCHITECTURES, token_batches
from torch import nn

from claq_exp.allocate.head import LEAST_IMPORTANCE
from claq_exp.allocate.survey import survey_model
from claq_exp.errors import CalibrationError, NumericalError
from claq_exp.models.discover import linear_weight
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.solver import Gptq, Nearest
from claq_exp.quantize.statistics import ColumnStatistics

BATCHES = token_batches(batches=2, size=3)


def inputs_by_hand(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """What enters each linear in ordinary passes: [tokens, in] float64."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2).double())
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in BATCHES:
            model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def importance_by_hand(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """E[(dL/dy_i)^2] with an added zero whose gradient is that of the output, in float64."""
    model = copy.deepcopy(model).double()
    squares: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for window in torch.cat(BATCHES):
        added: dict[str, torch.Tensor] = {}

        def add_zero(_module, _args, output, name, added=added):
            added[name] = torch.zeros_like(output, requires_grad=True)
            return output + added[name]

        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name, hook=add_zero: hook(
                    module, args, output, name
                )
            )
            for name in names
        ]
        logits = model(window[None], use_cache=False).logits[0]
        likelihoods = torch.log_softmax(logits[:-1], dim=-1)
        loss = -likelihoods[torch.arange(len(window) - 1), window[1:]].sum()
        gradients = torch.autograd.grad(loss, list(added.values()))
        for hook in hooks:
            hook.remove()
        for name, gradient in zip(added, gradients, strict=True):
            squares[name].append(gradient.flatten(0, -2).square())
    return {name: torch.cat(parts).mean(dim=0) for name, parts in squares.items()}


def surveyed(model: nn.Module, solver=None, **options) -> dict[str, ColumnStatistics]:
    return survey_model(model, BATCHES, solver or Gptq(), **{"gradients": True, **options})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_weigh_what_autograd_says_by_hand(name):
    model = ARCHITECTURES[name].build()
    names = ARCHITECTURES[name].linears()
    expected = importance_by_hand(model, names)
    found = surveyed(model)
    assert set(found) == set(names)
    for linear, statistics in found.items():
        row_weights = statistics.row_weights.double()
        by_hand = expected[linear].clamp(min=LEAST_IMPORTANCE * expected[linear].mean())
        assert row_weights.numpy() == pytest.approx(by_hand.numpy(), rel=1e-2), linear


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_statistics_have_the_shapes_and_weights_of_the_linears(name):
    model = ARCHITECTURES[name].build()
    for linear, statistics in surveyed(model).items():
        weight = linear_weight(model.get_submodule(linear))
        rows, columns = weight.shape
        assert statistics.shape == (rows, columns)
        assert torch.equal(statistics.weight, weight)
        assert statistics.distortion_weight.shape == (columns,)
        assert statistics.row_weights.shape == (rows,)
        assert statistics.row_weights.dtype == torch.float32
        assert (statistics.row_weights > 0).all()


@pytest.mark.parametrize("solver", [Gptq(), Gptq(act_order=False, damping=0.1), Nearest()], ids=str)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_columns_weigh_what_the_solver_says_of_the_original_models_hessian(name, gradients, solver):
    model = ARCHITECTURES[name].build()
    names = ARCHITECTURES[name].linears()
    inputs = inputs_by_hand(model, names)
    found = surveyed(model, solver, gradients=gradients)
    for linear in names:
        hessian = 2 / len(inputs[linear]) * inputs[linear].t() @ inputs[linear]
        expected = solver.prepare(Moments(hessian)).distortion_weight
        if not gradients:  # relative to what the layer puts out
            weight = linear_weight(model.get_submodule(linear)).detach().double()
            expected = expected / torch.trace(weight @ hessian @ weight.t())
            assert found[linear].row_weights is None
        assert found[linear].distortion_weight.numpy() == pytest.approx(expected.numpy(), rel=1e-2)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_model_is_left_as_it_was(gradients):
    model = ARCHITECTURES["llama"].build()
    parameters = list(model.parameters())
    for parameter in parameters[::3]:
        parameter.requires_grad_(False)
    before = [parameter.requires_grad for parameter in parameters]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    surveyed(model, gradients=gradients)
    assert [parameter.requires_grad for parameter in parameters] == before
    assert all(parameter.grad is None for parameter in parameters)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    modules = list(model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_a_gradient_that_is_no_number_is_refused_and_the_model_left_as_it_was():
    model = ARCHITECTURES["llama"].build()
    model.lm_head.weight.data[5, 5] = math.nan
    with pytest.raises(CalibrationError, match=r"gradients of model\.layers\.0\.\S+ are not"):
        surveyed(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert set(surveyed(model, gradients=False)) == set(ARCHITECTURES["llama"].linears())


def test_a_solver_that_gives_up_is_named_with_its_layer():
    class Stubborn(Nearest):
        def prepare(self, moments):
            raise NumericalError("no")

    with pytest.raises(NumericalError, match=r"model\.layers\.0\.self_attn\.q_proj: no"):
        surveyed(ARCHITECTURES["llama"].build(), Stubborn(), gradients=False)


def test_linears_of_one_input_share_their_columns_weights():
    found = surveyed(ARCHITECTURES["llama"].build(), gradients=False)
    query, key = (found[f"model.layers.1.self_attn.{part}_proj"] for part in "qk")
    assert query.shape[1] == key.shape[1]
    ratio = query.distortion_weight / key.distortion_weight
    assert ratio.numpy() == pytest.approx([ratio[0].item()] * len(ratio), rel=1e-4)


@pytest.mark.parametrize("gradients", [True, False])
def test_shares_of_the_work_add_up_to_one(gradients):
    shares: list[float] = []
    surveyed(
        ARCHITECTURES["gpt2"].build(),
        gradients=gradients,
        on_share=lambda share, _: shares.append(share),
    )
    assert sum(shares) == pytest.approx(1)


def test_the_size_of_batches_does_not_matter():
    model = ARCHITECTURES["llama"].build()
    one_by_one = [window[None] for window in torch.cat(BATCHES)]
    first, second = (
        survey_model(model, batches, Gptq(), gradients=True) for batches in (BATCHES, one_by_one)
    )
    for linear, statistics in first.items():
        for part in ("row_weights", "distortion_weight"):
            mine, theirs = getattr(statistics, part), getattr(second[linear], part)
            assert mine.numpy() == pytest.approx(theirs.numpy(), rel=1e-2)
