"""What an error in the outputs of a linear costs, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.quantize.moments import OUTPUT_GRADIENTS
from claq_exp.quantize.solver import Solver


class Objective(Protocol):
    """A rule for what the tokens weigh in a Hessian; derive from it to have these defaults.

    wants: frozenset({OUTPUT_GRADIENTS}) where the gradients of the loss in the outputs of linears
        must be measured; nothing is weighed without.
    """

    wants: ClassVar[frozenset[str]] = frozenset()

    @property
    def groups(self) -> int:
        """Neighbouring rows of a matrix, in so many groups, each with weights of its own."""
        return 1

    def weights(self, squares: Tensor) -> Tensor:
        """Return what an error in each group of rows weighs at each token, 1 on average.

        squares: [..., groups] float32, the mean over the rows of a group of (dL/dy)^2, of all
        calibration tokens.
        """
        return torch.ones_like(squares)

    def check(self, solver: Solver) -> None:
        """Raise ConfigError for a solver that cannot go with this."""
        name = type(solver).__name__
        if OUTPUT_GRADIENTS in solver.wants and OUTPUT_GRADIENTS not in self.wants:
            raise ConfigError(
                f"solver {name} wants output gradients, which are measured with "
                "objective=output_gradient"
            )
        if self.groups > 1 and not solver.row_groups:
            raise ConfigError(
                f"objective.groups is {self.groups}, and solver {name} takes one Hessian for all "
                "rows; set objective.groups=1, or solver=gptq or quantease"
            )


@dataclass(frozen=True)
class Plain(Objective):
    """Let every token count alike: the error is |(Q - W) x|^2."""


@dataclass(frozen=True)
class OutputGradient(Objective):
    """Let a token count by what an error in a linear's outputs changes in the model's loss.

    With g = dL/dy of a linear's outputs y, L the cross entropy of the calibration text, an error e
    in y changes L by g e to first order, and its square is the error's cost.  All rows of a group
    share the mean of g^2, so that their Hessian is sum over tokens of mean(g^2) x x^T.

    groups: neighbouring rows of a matrix, in so many groups, each with a Hessian of its own.
    power: of the mean of g^2; 1 is the paper's, and towards 0 all tokens become alike.
    clip: the most that a token may weigh, where 1 is the mean; null for no bound, as in the paper.
        A few tokens can have nearly all of the weight, e.g. the first of each window, to which
        attention looks, in the matrix of its values.  A Hessian of so few tokens fits their noise.

    Source: GuidedQuant (arXiv 2505.07004), eq. 7.
    """

    wants: ClassVar[frozenset[str]] = frozenset({OUTPUT_GRADIENTS})
    groups: int = 1
    power: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ConfigError(
                f"objective.groups is {self.groups}; give a whole number of groups from 1"
            )
        if not 0 < self.power <= 1:
            raise ConfigError(
                f"objective.power is {self.power}; give a number in (0, 1], or objective=plain"
            )

        if self.clip is not None and not self.clip > 1:
            raise ConfigError(
                f"objective.clip is {self.clip}; give a number above 1, the mean weight, or null"
            )

    def weights(self, squares: Tensor) -> Tensor:
        """Return the weights, see Objective.  Outputs that change nothing weigh 1."""
        largest = squares.max()
        if not largest > 0:
            return torch.ones_like(squares)
        powers = (squares / largest).double().pow(self.power)
        if self.clip is not None:
            powers = clipped(powers, self.clip)
        return (powers / powers.mean()).float()


def clipped(values: Tensor, times: float) -> Tensor:
    """Return values cut to a bound that is so many times the mean of what is returned.

    values: float64, none negative.  times: above 1.
    With the k largest of n cut to b and S the sum of the others, b = times (k b + S) / n: of the k
    for which b is no less than the others, the smallest.  Where so few values differ from 0 that
    there is none, they all become alike.
    """
    ordered = values.reshape(-1).sort(descending=True).values
    size = len(ordered)
    rest = ordered.flip(0).cumsum(0).flip(0)  # of a value and all smaller ones
    left = size / times - torch.arange(size, dtype=values.dtype, device=values.device)
    bounds = torch.where(left > 0, rest / left, torch.inf)
    fits = (bounds >= ordered) & (left > 0) & (rest > 0)
    if not fits.any():
        return (values > 0).to(values.dtype)
    return values.clamp(max=bounds[fits.int().argmax()])


PLAIN = Plain()
OBJECTIVE: dict[str, type] = {"plain": Plain, "output_gradient": OutputGradient}
