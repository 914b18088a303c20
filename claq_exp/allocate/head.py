"""What an error costs in the matrix that makes the logits; a tied model looks tokens up in it too.

All costs are in the unit of `claq_exp.allocate.survey`: sum_ij g_i d_j e_ij^2 for errors e, with
the importance g of rows and the distortion weight d of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from claq_exp.errors import CalibrationError
from claq_exp.models.discover import linear_weight
from claq_exp.quantize.solver import Solver
from claq_exp.quantize.solver.base import Prepared
from claq_exp.quantize.statistics import ColumnStatistics

LEAST_IMPORTANCE = 0.01  # of the mean: a few windows do not show that a row does not matter
POSITIONS = 64  # whose probabilities are in memory at a time


@dataclass(frozen=True)
class SurveyedHead:
    """A matrix that makes the logits: the head, or the one matrix of a tied model.

    name: of the module that holds it.  tied: tokens are looked up in it too.
    solver: that quantizes it.
    """

    name: str
    tied: bool
    solver: Solver


class HeadSurvey:
    """Sums what an error in each logit costs, and in each number that is looked up.

    **Logits.**  The loss of a token is -log softmax(z)[y].  Its second derivative in the logits z
    is diag(p) - p p^T with p = softmax(z), whatever y is: the Gauss-Newton matrix of cross-entropy
    and of KL.  It is also the mean of (p - onehot(y)) (p - onehot(y))^T, gradient times gradient,
    over tokens y drawn from p.  So its diagonal, E[p_i (1 - p_i)], has the unit of E[(dL/dy_i)^2],
    by which all other layers are measured.  It leaves out the chance of which token came next: a
    few thousand tokens show most of a vocabulary never.  Where a model changes each logit behind
    its head (Gemma 2 caps them), the square of the slope goes in.

    **Lookups** (tied).  An embedding is a linear layer on one-hot inputs, [width, vocabulary]: its
    Hessian is 2 diag(f), f_i the frequency of token i, and the importance of its outputs is
    G_j = E[(dL/dx_j)^2].  An error e_ij in the table costs 2 f_i G_j e_ij^2.
    """

    def __init__(self, model: PreTrainedModel, head: SurveyedHead) -> None:
        weight = linear_weight(model.get_submodule(head.name))
        self.head, self._weight = head, weight
        self._curvature = torch.zeros(weight.shape[0], device=weight.device)
        self._counts = torch.zeros(weight.shape[0])
        self._gradients = torch.zeros(weight.shape[1], device=weight.device)
        self._energies = torch.zeros(2, device=weight.device)  # of rows as given and as stored
        self._output: Tensor | None = None

    def watch(self, model: PreTrainedModel) -> list[Any]:
        """Hook the model, whose embedding's output has a gradient; return what takes hooks off."""
        hooks = [model.get_output_embeddings().register_forward_hook(self._note)]
        if self.head.tied:
            table: nn.Module = model.get_input_embeddings()
            hooks.append(table.register_forward_hook(self._look_up))
        return hooks

    def add(self, logits: Tensor, tokens: Tensor) -> None:
        """Add a window before its backward pass.

        logits: [1, seqlen, vocabulary], of the model.  tokens: [1, seqlen].  As for other layers,
        the last position counts as a token without a loss.
        """
        output, self._output = self._output, None
        slopes = None
        if output is not None and output is not logits:
            (slopes,) = torch.autograd.grad(logits.sum(), output, retain_graph=True)
        found = logits.detach()[0, :-1]
        for start in range(0, len(found), POSITIONS):
            chances = found[start : start + POSITIONS].float().softmax(dim=-1)
            variance = chances * (1 - chances)
            if slopes is not None:
                variance *= slopes[0, start : start + len(variance)].float().square()
            self._curvature += variance.sum(dim=0)
        self._counts += torch.bincount(tokens.reshape(-1).cpu(), minlength=len(self._counts))

    def statistics(self, prepared: Prepared) -> ColumnStatistics:
        """Return the price of an error in each column and row.

        prepared: of the head's solver, from the Hessian H of what enters the head.
        Logits alone cost g_i d_j: the curvature of row i, and d_j = 1 / U_jj^2 under GPTQ.  How
        often a token is predicted, g / sum(g), and how often it occurs, f, are nearly the same;
        their mean r stands for both, so that r_i (sum(g) d_j + 2 G_j) is the price of a tied
        matrix.  An error is taken to stay in its column when rows are looked up.
        Raises CalibrationError when something is not finite.
        """
        name, tokens = self.head.name, self._counts.sum()
        weight = self._weight.detach().to("cpu", torch.float32)
        curvature, cost = self._curvature.cpu() / tokens, prepared.distortion_weight
        rows = curvature
        if self.head.tied:
            given, stored = self._energies.cpu()
            gradients = self._gradients.cpu() / tokens * (given / stored)
            whole = curvature.sum().clamp(min=torch.finfo(torch.float32).tiny)
            rows = (curvature / whole + self._counts / tokens) / 2
            cost = whole * cost + 2 * gradients
        if not (torch.isfinite(rows).all() and torch.isfinite(cost).all()):
            raise CalibrationError(
                f"the gradients of {name} are not finite; set embedding=kmeans, or check "
                "model.dtype"
            )
        return ColumnStatistics(weight, cost, prepared.order, name, at_least(rows))

    def _note(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        self._output = output

    def _look_up(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Note a lookup; its output may be the stored rows times a scale (Gemma)."""
        stored = self._weight.detach()[args[0]].float().square().sum()
        self._energies += torch.stack([output.detach().float().square().sum(), stored])
        output.register_hook(self._add_gradient)

    def _add_gradient(self, gradient: Tensor) -> None:
        self._gradients += gradient.reshape(-1, gradient.shape[-1]).float().square().sum(dim=0)


def at_least(importance: Tensor) -> Tensor:
    """Return the importance of rows, and a share of their mean for those that seem to have none."""
    return importance.clamp(min=LEAST_IMPORTANCE * importance.mean().item())
