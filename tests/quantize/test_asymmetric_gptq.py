"""GPTQ that follows the original's outputs, against least squares over the tokens themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import Led, damped, recipe
from torch import Tensor

from claq_exp.errors import ConfigError, NumericalError
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.codebook import CODEBOOK, Codebook, ColumnQuantizer, KMeans, Uniform
from claq_exp.quantize.moments import CROSS, Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, quantize_weight
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import Gptq, Nearest
from claq_exp.quantize.solver.base import Solved
from claq_exp.quantize.solver.columns import ColumnSystem, shift_


@dataclass(frozen=True)
class Layer:
    """A weight, and what enters it in both models: [tokens, in] float64 each."""

    weight: Tensor
    teacher: Tensor
    student: Tensor

    def moments(self, **options: bool) -> Moments:
        scale = 2 / len(self.student)
        cross = (self.teacher - self.student).t() @ self.student
        return Moments(
            scale * self.student.t() @ self.student, scale * cross, len(self.student), **options
        )

    def single(self) -> LinearProblem:
        return LinearProblem(self.weight, self.moments().single())

    def solved(self, chosen: Recipe, **options: bool) -> Solved:
        prepared = chosen.solver.prepare(self.moments(**options))
        return quantize_weight(self.single(), prepared, chosen)

    def distance(self, solved: Solved) -> float:
        """Squared distance of the outputs to the original's, over the original's squares."""
        target = self.teacher @ self.weight.double().t()
        missed = self.student @ solved.quantized.dequantize().double().t() - target
        return (missed.square().sum() / target.square().sum()).item()


def layer(rows: int, columns: int, seed: int, lost: float = 0.3, tokens: int = 0) -> Layer:
    """Correlated inputs; the student's are the teacher's times a matrix near one, and noise.

    lost: size of what the student's inputs differ by, for teachers' of size one.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = normal(columns, columns) / columns**0.5
    teacher = normal(tokens or 8 * columns, columns) @ mixing
    moved = teacher @ normal(columns, columns) / columns**0.5 + 0.5 * normal(*teacher.shape)
    return Layer(normal(rows, columns).float(), teacher, teacher + lost * moved)


def shortened(_: int, values: np.ndarray) -> np.ndarray:
    """A rule without steps: there is no border that a rounding could push a value over."""
    return values * 0.875


def by_least_squares(
    problem: Layer, order: list[int], damping: float, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the columns left anew after each column, over all tokens; float64.

    With columns V visited, q of them quantized, F left: v_F minimizes over tokens
    |sum of V (w_j x'_j - q_j x_j) + sum of F (w_k - v_k) x_k|^2, where x' = x + share * (x_teacher
    - x).  Damping is one token more for each input, the same in both models.
    Returns (quantized, compensated), both [out, in].
    """
    weight, student = problem.weight.double().numpy(), problem.student.numpy()
    teacher = student + share * (problem.teacher.numpy() - student)
    mean = np.square(student).sum() / student.shape[1]
    extra = math.sqrt(damping * mean) * np.eye(student.shape[1])
    student, teacher = np.vstack([student, extra]), np.vstack([teacher, extra])
    quantized, compensated, left = np.zeros_like(weight), weight.copy(), list(order)
    while left:
        column = left.pop(0)
        quantized[:, column] = shortened(column, compensated[:, column])
        done = order[: len(order) - len(left)]
        target = teacher[:, done] @ weight[:, done].T - student[:, done] @ quantized[:, done].T
        target += student[:, left] @ weight[:, left].T
        found = np.linalg.lstsq(student[:, left], target, rcond=None)[0] if left else None
        if found is not None:
            compensated[:, left] = found.T
    return quantized, compensated


class Shortened(Codebook):
    """The codebook of `shortened`: `Led` compares what it is given."""

    mixed_widths = True
    reserves = True

    def start(self, statistics, plan):
        return ShortenedColumns(statistics.weight)


class ShortenedColumns(ColumnQuantizer):
    def __init__(self, weight: Tensor) -> None:
        self.found = torch.zeros_like(weight)

    def code_column(self, column, values):
        quantized = shortened(column, values)
        self.found[:, column] = torch.from_numpy(quantized)
        return quantized

    def payload(self):
        return self

    def dequantize(self):
        return self.found.clone()

    def finite(self):
        return True

    def clamped(self):
        return 0


@pytest.mark.parametrize("block_size", [1, 5, 128])
@pytest.mark.parametrize(
    ("act_order", "share", "damping"),
    [(True, 1.0, 0.01), (False, 1.0, 0.1), (True, 0.25, 0.02), (True, 0.0, 0.01)],
)
def test_each_step_is_the_least_squares_solution_over_the_tokens(
    act_order, share, damping, block_size
):
    problem = layer(rows=6, columns=19, seed=3)
    solver = Gptq(act_order, block_size, damping, share)
    order = solver.prepare(problem.moments()).order.tolist()
    quantized, compensated = by_least_squares(problem, order, damping, share)
    system, single = solver.prepare(problem.moments()), problem.single()
    columns = recipe(solver=solver).plan(system.statistics(single))
    solved = solver.solve(single, system, MatrixPlan(Led(Shortened(), compensated), columns))
    found = solved.quantized.dequantize().double().numpy()
    assert found == pytest.approx(quantized, rel=0, abs=1e-4 * np.abs(quantized).max())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [1, 2, 40, 300])
@pytest.mark.parametrize("disposable", [True, False])
def test_a_correction_is_what_dense_normal_equations_give_for_each_column(
    act_order, columns, disposable
):
    problem = layer(rows=1, columns=columns, seed=columns)
    moments = problem.moments(disposable=disposable)
    system = Gptq(act_order, damping=0.05, asymmetric=1.0).prepare(moments)
    assert moments.used_up == disposable
    order = system.order.tolist()
    hessian = damped(problem.moments().single(), 0.05)[np.ix_(order, order)]
    cross = problem.moments().cross[0].numpy()[np.ix_(order, order)]
    expected = np.zeros((columns, columns))
    for row in range(0, columns - 1, max(1, columns // 25)):
        left = slice(row + 1, None)
        expected[row, left] = np.linalg.solve(hessian[left, left], cross[row, left])
        found = system.correction[row].double().numpy()
        assert found == pytest.approx(expected[row], rel=0, abs=2e-4 * np.abs(expected).max())
    assert torch.equal(system.correction, system.correction.triu(1))


@settings(max_examples=40)
@given(
    columns=st.integers(1, 30),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 999),
)
def test_a_share_scales_the_correction_and_leaves_all_else(columns, share, seed):
    problem = layer(rows=2, columns=columns, seed=seed)
    whole, part, plain = (
        Gptq(asymmetric=of).prepare(problem.moments()) for of in (1.0, share, 0.0)
    )
    assert part.correction.numpy() == pytest.approx(share * whole.correction.numpy(), rel=1e-6)
    assert plain.correction is None
    for name in ("order", "inverse_factor", "distortion_weight", "added", "dead"):
        assert torch.equal(getattr(part, name), getattr(plain, name)), name


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 700])
def test_columns_are_shifted_by_all_columns_before_them(columns):
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(5, columns, generator=generator)
    correction = torch.randn(columns, columns, generator=generator).triu(1) / columns
    work = weight.t().contiguous()
    exact = weight.t().contiguous()
    shift_(work, correction)
    shift_(exact, correction, wide=True)
    expected = weight.double() + weight.double() @ correction.double()
    assert work.t().numpy() == pytest.approx(expected.numpy(), rel=0, abs=1e-4)
    assert exact.t().numpy() == pytest.approx(expected.numpy(), rel=2e-7, abs=2e-7)


@pytest.mark.parametrize("name", CODEBOOK)
def test_where_nothing_was_lost_it_is_plain_gptq(name):
    codebook = CODEBOOK[name]()
    bits = {"mxfp4": 4, "nvfp4": 4, "svid": 1}.get(name, 2)
    problem = layer(rows=30, columns=17, seed=1, lost=0.0)
    chosen = {"codebook": codebook, "precision": Fixed(bits)}
    plain = problem.solved(recipe(**chosen, solver=Gptq()))
    found = problem.solved(recipe(**chosen, solver=Gptq(asymmetric=1.0)))
    packed = plain.quantized.pack()
    assert all(torch.equal(found.quantized.pack()[key], value) for key, value in packed.items())
    assert found.output_error == pytest.approx(plain.output_error, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_come_nearer_to_the_originals_on_average(bits):
    distances: dict[float, list[float]] = {0.0: [], 0.5: [], 1.0: []}
    for seed in range(10):
        problem = layer(rows=32, columns=24, seed=seed)
        for share, found in distances.items():
            chosen = recipe(precision=Fixed(bits), solver=Gptq(asymmetric=share))
            found.append(problem.distance(problem.solved(chosen)))
    plain, half, whole = (np.mean(found) for found in distances.values())
    assert half < 0.95 * plain
    assert whole < 0.92 * plain


def following_moved_weights(system: ColumnSystem) -> ColumnSystem:
    """The authors' rule inside a block of columns: w_j P[j, k] with w_j as it was moved.

    With c the columns as they are quantized, c = w + c P - e U', U' the strict part of U; that is
    c = (w - e U') T with T = (I - P)^-1.
    """
    factor = system.inverse_factor.double()
    identity = torch.eye(len(factor), dtype=torch.float64)
    through = torch.linalg.inv(identity - system.correction.double())
    moved = torch.diag(factor.diagonal()) + factor.triu(1) @ through
    correction = (through - identity).float()
    return replace(system, correction=correction, inverse_factor=moved.float().contiguous())


def test_the_original_weight_is_followed_better_than_the_moved_one():
    distances = {"original": 0.0, "moved": 0.0}
    chosen = recipe(solver=Gptq(asymmetric=1.0))
    for seed in range(12):
        problem = layer(rows=48, columns=48, seed=seed)
        system = chosen.solver.prepare(problem.moments())
        for name, used in {"original": system, "moved": following_moved_weights(system)}.items():
            distances[name] += problem.distance(quantize_weight(problem.single(), used, chosen))
    assert distances["original"] < 0.98 * distances["moved"]


def recomputed(problem: Layer, solved: Solved) -> float:
    exact, hessian = problem.weight.double(), problem.moments().single()
    difference = solved.quantized.dequantize().double() - exact
    wrong = torch.trace(difference @ hessian @ difference.t())
    return (wrong / torch.trace(exact @ hessian @ exact.t())).item()


@pytest.mark.parametrize("disposable", [True, False])
@pytest.mark.parametrize("dead", [[], [2, 7]])
@pytest.mark.parametrize("codebook", [KMeans(), KMeans(shared=True), Uniform(5)], ids=str)
@pytest.mark.parametrize("damping", [0.01, 0.4])
def test_the_reported_error_is_still_that_on_the_students_inputs(
    damping, codebook, dead, disposable
):
    problem = layer(rows=31, columns=14, seed=5)
    problem.student[:, dead] = 0
    problem.weight[:, dead] *= 100
    solver = Gptq(block_size=4, damping=damping, asymmetric=0.7)
    solved = problem.solved(recipe(codebook=codebook, solver=solver), disposable=disposable)
    assert solved.output_error == pytest.approx(recomputed(problem, solved), rel=1e-4)
    assert solved.dead_columns == len(dead)


def test_reserved_entries_are_in_the_reported_error():
    problem = layer(rows=40, columns=14, seed=6)
    problem.weight[3, 2] = 90.3
    chosen = recipe(reservation=FixedReservation(0.1), solver=Gptq(asymmetric=1.0))
    solved = problem.solved(chosen)
    assert solved.output_error == pytest.approx(recomputed(problem, solved), rel=1e-3)


@pytest.mark.parametrize("act_order", [True, False])
def test_an_input_that_the_student_lost_stays_and_others_make_up_for_it(act_order):
    problem = layer(rows=25, columns=10, seed=7)
    problem.student[:, 2] = 0
    system = Gptq(act_order, asymmetric=1.0).prepare(problem.moments())
    place = system.order.tolist().index(2)
    assert not system.correction[:, place].any()
    assert system.correction[place, place + 1 :].all()
    solved = problem.solved(recipe(solver=Gptq(act_order, asymmetric=1.0)))
    nearest = problem.solved(recipe(solver=Nearest()))
    dense, rounded = solved.quantized.dequantize(), nearest.quantized.dequantize()
    assert torch.equal(dense[:, 2], rounded[:, 2])


def test_each_group_of_rows_has_a_correction_of_its_own():
    problem = layer(rows=20, columns=9, seed=8)
    one = problem.moments()
    groups = Moments(
        torch.cat([0.5 * one.hessian, 1.5 * one.hessian]),
        torch.cat([1.5 * one.cross, 0.5 * one.cross]),
    )
    solver = Gptq(asymmetric=1.0)
    found = solver.prepare(groups)
    for group, part in enumerate(found.parts):
        expected = solver.prepare(Moments(groups.hessian[group], groups.cross[group]))
        assert torch.equal(part.correction, expected.correction)
        assert torch.equal(part.inverse_factor, expected.inverse_factor)


def test_an_indefinite_hessian_is_refused_with_its_moments_as_they_were():
    hessian = torch.diag(torch.tensor([1.0, 1.0, -5.0], dtype=torch.float64))
    moments = Moments(hessian.clone(), torch.ones_like(hessian), disposable=True)
    with pytest.raises(NumericalError, match="positive definite"):
        Gptq(asymmetric=1.0).prepare(moments)
    assert torch.equal(moments.single(), hessian)
    assert torch.equal(moments.cross[0], torch.ones_like(hessian))


def test_nothing_is_wanted_where_it_is_off_and_the_cross_moment_where_it_is_on():
    assert Gptq().wants == Nearest().wants == frozenset()
    assert Gptq(asymmetric=0.25).wants == {CROSS}
    with pytest.raises(ValueError, match="needs the cross moment"):
        Gptq(asymmetric=0.25).prepare(Moments(torch.eye(3, dtype=torch.float64)))


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match=r"solver\.asymmetric is .*from 0 \(off\) to 1"):
        Gptq(asymmetric=share)
