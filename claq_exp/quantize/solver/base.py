"""What a solver is, what it prepares, and how a solution is described."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from claq_exp.errors import NumericalError
from claq_exp.payload.base import Payload
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.statistics import ColumnStatistics
from claq_exp.quantize.symmetric import bands


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a solver found out once for all linears that share an input; solvers add their own.

    order: [in] int64, the columns as they are visited.
    distortion_weight: [in] float32, layer loss per squared error of a column, columns in the
        matrix's own order.
    dead: [in] bool, inputs that were zero on every calibration token.
    added: [in] float64, what was added to the Hessian's diagonal in all, columns in the matrix's
        own order.
    damping: share of the mean diagonal that was added to the diagonal; None without compensation.
    raised: the damping had to be larger than what was asked for.
    nearest: why nothing is compensated although it was asked for: "unfed", all inputs are dead, or
        "indefinite", no damping was enough; else empty.
    diagonal: [in] float32, of the Hessian, for codebooks that ask for it; may be left out.
    """

    order: Tensor
    distortion_weight: Tensor
    dead: Tensor
    added: Tensor
    damping: float | None = None
    raised: bool = False
    nearest: str = ""
    diagonal: Tensor | None = None

    def cpu(self) -> Self:
        """Return the same on the CPU."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value.cpu() if isinstance(value, Tensor) else value
        return replace(self, **moved)

    def at_hand(self) -> Self:
        """Return the same with its vectors on the CPU; matrices stay where they are."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.dim() < 2:
                moved[field.name] = value.cpu()
        return replace(self, **moved)

    @cached_property
    def outline(self) -> Prepared:
        """What is said above, on the CPU, without a solver's own."""
        own = {field.name: getattr(self, field.name) for field in fields(Prepared)}
        return Prepared(**own).cpu()

    def statistics(
        self, problem: LinearProblem, row_weights: Tensor | None = None
    ) -> ColumnStatistics:
        """Return what the other strategies may know of a matrix.  row_weights: [out] float32."""
        return ColumnStatistics(
            problem.weight,
            self.distortion_weight,
            self.order,
            problem.name,
            row_weights,
            self.diagonal,
        )

    def excess(self, difference: Tensor) -> float:
        """Return what `added` adds to the loss of a difference [out, in]; dead columns add none."""
        squares = _column_squares(difference)
        return float((squares * self.added)[~self.dead].sum())


@dataclass(frozen=True)
class Solved:
    """A quantized matrix, how well it went, and what went otherwise than asked.

    output_error: tr(D H D^T) / tr(W H W^T) with D = Q - W, on the student's calibration inputs,
        whatever the solver aimed at.  weight_error: |D|^2 / |W|^2.
    damping: of the solver; raised: it had to be larger than asked.
    dead_columns: inputs that were zero on every token.
    nearest: why all columns were rounded to nearest, see Prepared.
    clamped: weights that their level puts beyond float16, and that are cut to its range.
    unconverged: columns whose clustering stopped at its limit of passes.
    retreats: how often memory was short, and the work went on in smaller parts or on the CPU.
    """

    quantized: Payload
    output_error: float
    weight_error: float
    damping: float | None
    dead_columns: int
    raised: bool = False
    nearest: str = ""
    clamped: int = 0
    unconverged: int = 0
    retreats: int = 0


class Solver(Protocol):
    """A rule for the codes of a matrix: it alone decides where the error of a weight goes."""

    @property
    def passes(self) -> int:
        """How often every column is coded, for estimates of time."""
        return 1

    @property
    def work(self) -> tuple[int, int]:
        """Float32 matrices [in, in] and [out, in] beside a column loop's, for the plan."""
        return 0, 0

    @property
    def fits_levels(self) -> bool:
        """Whether the solver chooses levels: it is refused with codebooks that forbid it."""
        return False

    @property
    def holds_levels(self) -> bool:
        """Whether quantizers must `hold` their levels: refused with codebooks that cannot."""
        return False

    @property
    def moves_reserved(self) -> bool:
        """Whether the solver moves reserved entries where the plan has a `thresholding`."""
        return False

    @property
    def multiplies_on_device(self) -> bool:
        """Whether `solve` takes what is prepared with its matrices on a device, see `at_hand`."""
        return False

    @property
    def wants(self) -> frozenset[str]:
        """What the moments of inputs must hold beside a plain Hessian.

        Members of `claq_exp.quantize.moments.WANTED`: "cross", the cross moment of teacher and
        student; "output_gradients", tokens that are weighed by the gradients of the loss, which the
        objective measures.  Nobody measures what is not wanted.
        """
        return frozenset()

    @property
    def row_groups(self) -> bool:
        """Whether groups of rows may have a Hessian each.

        If not, `prepare` takes the mean over groups, and an objective with groups is refused.
        """
        return False

    def prepare(self, moments: Moments) -> Prepared:
        """Do what is the same for all linears with one input.

        The moments stay as they are, unless they are disposable.
        Raises NumericalError and leaves even those as they were; the linears are then rounded to
        nearest.
        """

    def solve(self, problem: LinearProblem, prepared: Any, plan: MatrixPlan) -> Solved:
        """Quantize one matrix on the CPU.

        prepared: of `prepare`, on the CPU, or `at_hand` where the solver `multiplies_on_device`.
        plan: the codebook, widths and reserved entries.
        The problem has no Hessian any more where `prepare` has used it up.
        Raises NumericalError when a level or reserved value does not fit float16.
        """

    def solve_together(
        self,
        problems: Sequence[LinearProblem],
        prepared: Any,
        plans: Sequence[MatrixPlan],
        device: torch.device,
    ) -> list[Solved] | None:
        """Quantize matrices that share their input on a device, all at once.

        prepared: on any device.  Returns None where `solve` must do it.
        """
        return None


def describe(
    problem: LinearProblem,
    prepared: Prepared,
    quantized: Payload,
    loss: float | None = None,
) -> Solved:
    """Measure how well a matrix was quantized.

    loss: tr(D (H + diag(added)) D^T) without dead columns, where the solver knows it; else the
        problem's Hessian tells the error.
    Raises NumericalError when a level does not fit float16.
    """
    weight = problem.weight
    if not quantized.finite():
        raise NumericalError(
            f"weights up to {weight.abs().max().item():.3g} need levels beyond float16 (65504); "
            "rescale the model's weights"
        )
    difference = quantized.dequantize().sub_(weight)
    squares, norm = _column_squares(difference), float(_column_squares(weight).sum())
    wrong = problem.error(difference) if loss is None else loss - prepared.excess(difference)
    whole = problem.energy()
    return Solved(
        quantized=quantized,
        output_error=max(wrong, 0.0) / whole if whole > 0 else 0.0,
        weight_error=float(squares.sum()) / norm if norm > 0 else 0.0,
        damping=prepared.damping,
        dead_columns=int(prepared.dead.sum()),
        raised=prepared.raised,
        nearest=prepared.nearest,
        clamped=quantized.clamped(),
    )


def _column_squares(matrix: Tensor) -> Tensor:
    """Return the sum of squares of each column, in float64 and without a second matrix."""
    squares = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for band in bands(len(matrix)):
        squares += matrix[band].square().sum(dim=0, dtype=torch.float64)
    return squares
