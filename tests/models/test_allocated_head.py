"""What an error in the matrix of the logits costs, against autograd in float64 and the loss."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_survey import BATCHES, inputs_by_hand
from tiny_architectures import ARCHITECTURES
from torch import Tensor, nn

from claq_exp.allocate.head import LEAST_IMPORTANCE, SurveyedHead
from claq_exp.allocate.survey import survey_model
from claq_exp.errors import CalibrationError, NumericalError
from claq_exp.models.ends import find_ends
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.solver import Gptq, Nearest

TIED = ("llama_tied_biased", "gpt2", "opt_350m", "gemma2", "gemma3")
UNTIED = ("llama", "gpt_neox", "phi", "mixtral")
WINDOWS = torch.cat(BATCHES)


def built(name: str, *, tied: bool) -> tuple[nn.Module, SurveyedHead]:
    options = {**ARCHITECTURES[name].options, "tie_word_embeddings": tied}
    model = replace(ARCHITECTURES[name], options=options).build()
    ends = find_ends(model)
    return model, SurveyedHead(ends.embedding if tied else ends.head, tied, Gptq())


def surveyed(model: nn.Module, head: SurveyedHead):
    return survey_model(model, BATCHES, Gptq(), gradients=True, head=head)[head.name]


def with_zero(module: nn.Module, kept: list[Tensor]):
    """Have a zero added to a module's output, whose gradient is that of the output."""

    def add(_module, _args, output):
        kept.append(torch.zeros_like(output, requires_grad=True))
        return output + kept[-1]

    return module.register_forward_hook(add)


def curvature_by_hand(model: nn.Module) -> Tensor:
    """E[(d -log p_y / d output_i)^2], y drawn from the model's own p: [vocabulary] float64.

    Every token is tried as y.  The last position has no loss, and counts as a token.
    """
    model = copy.deepcopy(model).double()
    total = torch.zeros(model.get_output_embeddings().weight.shape[0], dtype=torch.float64)
    for window in WINDOWS:
        kept: list[Tensor] = []
        hook = with_zero(model.get_output_embeddings(), kept)
        chances = model(window[None], use_cache=False).logits[0, :-1].log_softmax(dim=-1)
        hook.remove()
        for token in range(chances.shape[1]):
            (slope,) = torch.autograd.grad(chances[:, token].sum(), kept, retain_graph=True)
            total += (chances[:, token, None].exp() * slope[0, :-1].square()).sum(dim=0).detach()
    return total / WINDOWS.numel()


def lookups_by_hand(model: nn.Module) -> Tensor:
    """E[(dL/dw_j)^2], w the row that is looked up, before any scale: [width] float64."""
    model = copy.deepcopy(model).double()
    total = torch.zeros(model.get_input_embeddings().weight.shape[1], dtype=torch.float64)
    for window in WINDOWS:
        rows = model.get_input_embeddings().weight.detach()[window].requires_grad_()
        table = model.get_input_embeddings()
        scale = getattr(table, "embed_scale", torch.ones(()))
        hook = table.register_forward_hook(
            lambda _module, _args, _output, rows=rows, scale=scale: (rows * scale.double())[None]
        )
        logits = model(window[None], use_cache=False).logits[0, :-1].log_softmax(dim=-1)
        hook.remove()
        loss = -logits[torch.arange(len(window) - 1), window[1:]].sum()
        (gradient,) = torch.autograd.grad(loss, rows)
        total += gradient.square().sum(dim=0)
    return total / WINDOWS.numel()


def hessian_by_hand(model: nn.Module) -> Tensor:
    names = {module: name for name, module in model.named_modules()}
    (inputs,) = inputs_by_hand(model, [names[model.get_output_embeddings()]]).values()
    return 2 / len(inputs) * inputs.t() @ inputs


@pytest.mark.parametrize("name", UNTIED)
def test_logits_weigh_their_curvature_and_columns_what_the_solver_says(name):
    model, head = built(name, tied=False)
    found, expected = surveyed(model, head), curvature_by_hand(model)
    expected = expected.clamp(min=LEAST_IMPORTANCE * expected.mean())
    assert found.row_weights.numpy() == pytest.approx(expected.numpy(), rel=1e-2)
    prepared = Gptq().prepare(Moments(hessian_by_hand(model)))
    by_hand = prepared.distortion_weight.numpy()
    assert found.distortion_weight.numpy() == pytest.approx(by_hand, rel=1e-2)
    assert torch.equal(found.weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize("name", TIED)
def test_a_tied_matrix_costs_its_logits_and_its_lookups(name):
    model, head = built(name, tied=True)
    found, curvature = surveyed(model, head), curvature_by_hand(model)
    counts = torch.bincount(WINDOWS.flatten(), minlength=len(curvature)).double()
    shares = (curvature / curvature.sum() + counts / counts.sum()) / 2
    shares = shares.clamp(min=LEAST_IMPORTANCE * shares.mean())
    assert found.row_weights.numpy() == pytest.approx(shares.numpy(), rel=1e-2)
    for solver in (Gptq(), Nearest()):
        found = surveyed(model, replace(head, solver=solver))
        columns = solver.prepare(Moments(hessian_by_hand(model))).distortion_weight.double()
        expected = curvature.sum() * columns + 2 * lookups_by_hand(model)
        assert found.distortion_weight.numpy() == pytest.approx(expected.numpy(), rel=1e-2)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_price_of_errors_in_a_head_is_what_they_do_to_the_divergence(name):
    """Errors without compensation: the divergence grows by half the curvature, and H is 2 x x^T."""
    model, head = built(name, tied=False)
    found = surveyed(model, replace(head, solver=Nearest()))
    model = model.double()
    weight = model.get_output_embeddings().weight
    errors = 1e-3 * torch.randn(weight.shape, generator=torch.manual_seed(1)).double()
    price = found.row_weights.double() @ errors.square() @ found.distortion_weight.double()
    with torch.no_grad():
        before = model(WINDOWS, use_cache=False).logits[:, :-1].log_softmax(dim=-1)
        weight += errors
        after = model(WINDOWS, use_cache=False).logits[:, :-1].log_softmax(dim=-1)
    divergence = (before.exp() * (before - after)).sum() / WINDOWS.numel()
    assert float(divergence) == pytest.approx(float(price) / 4, rel=0.3)


def test_the_blocks_are_measured_as_without_a_head():
    model, head = built("gemma2", tied=True)
    alone = survey_model(model, BATCHES, Gptq(), gradients=True)
    shares: list[float] = []
    found = survey_model(
        model,
        BATCHES,
        Gptq(),
        gradients=True,
        head=head,
        on_share=lambda share, _: shares.append(share),
    )
    assert [*found] == [*alone, head.name]
    for name, statistics in alone.items():
        assert torch.equal(statistics.distortion_weight, found[name].distortion_weight)
        assert torch.equal(statistics.row_weights, found[name].row_weights)
    assert sum(shares) == pytest.approx(1)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_measured_is_refused_by_name():
    class Stubborn(Nearest):
        def prepare(self, moments):
            raise NumericalError("no")

    model, head = built("llama", tied=False)
    with pytest.raises(NumericalError, match="lm_head: no"):
        surveyed(model, replace(head, solver=Stubborn()))
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        surveyed(model, head)
