"""GPTQ against a float64 reference that inverts the Hessian anew for every column."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import (
    Led,
    damped,
    explicit_obs,
    fitted,
    random_problem,
    recipe,
    solve,
)

from claq_exp.errors import ConfigError, NumericalError
from claq_exp.quantize.codebook import ColumnQuantizer, KMeans, Uniform
from claq_exp.quantize.codebook.clustering import fit_levels
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import Gptq, Nearest
from claq_exp.quantize.solver.columns import _spread, parts_of, quantize_columns


def kmeans_rule(bits: int, reserved: int = 0):
    """The reference's column rule: largest magnitudes in float16, the others on fitted levels."""
    codes: dict[int, np.ndarray] = {}

    def quantize(column: int, values: np.ndarray) -> np.ndarray:
        single = values.astype(np.float32)  # what the package sees, where it is led
        by_size = np.argsort(-np.abs(single), kind="stable")
        kept = by_size[:reserved]
        weights = np.ones(len(single), dtype=np.float32)
        weights[kept] = 0
        levels = fitted(fit_levels, single, 2**bits, weights)
        levels = levels.astype(np.float16).astype(np.float64)
        distances = np.abs(single.astype(np.float64)[:, None] - levels[None, :])
        codes[column] = distances.argmin(axis=1)
        codes[column][kept] = 0
        quantized = levels[codes[column]]
        quantized[kept] = single[kept].astype(np.float16)
        return quantized

    return quantize, codes


def falling_diagonal(hessian: torch.Tensor) -> list[int]:
    return np.argsort(-hessian.diagonal().numpy(), kind="stable").tolist()


@pytest.mark.parametrize("block_size", [1, 3, 17, 128])
@pytest.mark.parametrize(
    ("bits", "act_order", "damping"), [(2, True, 0.01), (3, False, 1e-4), (4, True, 1e-3)]
)
def test_codes_and_weights_are_those_of_optimal_brain_surgery(bits, act_order, damping, block_size):
    weight, hessian = random_problem(rows=40, columns=17, seed=bits)
    order = falling_diagonal(hessian) if act_order else range(17)
    rule, codes = kmeans_rule(bits)
    expected, compensated = explicit_obs(weight, damped(hessian, damping), order, rule)
    solver = Gptq(act_order=act_order, block_size=block_size, damping=damping)
    chosen = recipe(codebook=Led(KMeans(), compensated), precision=Fixed(bits), solver=solver)
    result = solve(weight, hessian, chosen).quantized
    assert result.codes.tolist() == np.stack([codes[j] for j in range(17)], axis=1).tolist()
    assert np.array_equal(result.dequantize().numpy(), expected)


@pytest.mark.parametrize("block_size", [4, 128])
def test_errors_of_reserved_entries_do_not_spread(block_size):
    weight, hessian = random_problem(rows=30, columns=12, seed=7)
    rule, codes = kmeans_rule(bits=3, reserved=3)
    order = falling_diagonal(hessian)
    expected, compensated = explicit_obs(weight, damped(hessian, 1e-3), order, rule)
    chosen = recipe(
        codebook=Led(KMeans(), compensated),
        reservation=FixedReservation(ratio=3 / 30),
        solver=Gptq(block_size=block_size, damping=1e-3),
    )
    result = solve(weight, hessian, chosen).quantized
    assert result.codes.tolist() == np.stack([codes[j] for j in range(12)], axis=1).tolist()
    assert np.array_equal(result.dequantize().numpy(), expected)
    for column in range(12):
        single = compensated[:, column].astype(np.float32)
        largest = np.sort(np.argsort(-np.abs(single), kind="stable")[:3])
        mine = result.reserved.columns() == column
        assert result.reserved.rows[mine].tolist() == largest.tolist()
        kept = result.reserved.values[mine].numpy()
        assert np.array_equal(kept, single[largest].astype(np.float16))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [1, 23, 256, 257, 600])
def test_inverse_factor_is_upper_and_squares_to_the_inverse_of_the_damped_hessian(
    columns, act_order
):
    _, hessian = random_problem(rows=1, columns=columns, seed=1)
    system = Gptq(act_order=act_order, damping=0.01).prepare(Moments(hessian))
    order = falling_diagonal(hessian) if act_order else list(range(columns))
    assert system.order.tolist() == order
    factor = system.inverse_factor.double().numpy()
    assert np.array_equal(factor, np.triu(factor))
    inverse = np.linalg.inv(damped(hessian, 0.01)[np.ix_(order, order)])
    bounds = np.maximum(1e-4 * np.abs(inverse), 1e-6 * np.abs(inverse).max())
    assert (np.abs(factor.T @ factor - inverse) <= bounds).all()
    assert system.damping == 0.01


@pytest.mark.parametrize("columns", [1, 23, 256, 257, 600])
def test_a_wide_factor_has_no_rounding_but_its_own(columns):
    _, hessian = random_problem(rows=1, columns=columns, seed=1)
    system = Gptq(act_order=False).prepare(Moments(hessian, wide=True))
    assert system.wide
    expected = np.linalg.cholesky(np.linalg.inv(damped(hessian, 0.01))).T
    missed = np.abs(system.inverse_factor.double().numpy() - expected)
    assert (missed <= 2.0**-24 * np.abs(expected) + 1e-11 * np.abs(expected).max()).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_wide_errors_are_spread_with_one_rounding(groups):
    rows, columns, size = 12, 700, 128
    weight, hessian = random_problem(rows=rows, columns=columns, seed=5)
    system = Gptq(block_size=size).prepare(Moments(torch.stack([hessian] * groups), wide=True))
    parts = parts_of(system, rows)
    work = weight.t().contiguous()
    errors = torch.randn(size, rows, generator=torch.Generator().manual_seed(1))
    expected = work.double()
    for part, own in parts:
        across = part.inverse_factor[:size, size:].double()
        expected[size:, own] -= across.t() @ errors[:, own].double()
    _spread(work, errors, parts, slice(0, size), slice(size, columns))
    assert torch.equal(work[:size], weight.t()[:size])
    limit = 2.0**-24 * expected.abs() + 1e-12
    assert ((work.double() - expected).abs() <= limit).all()


def test_distortion_weight_is_what_an_error_costs_while_later_columns_still_help():
    _, hessian = random_problem(rows=1, columns=9, seed=2)
    system = Gptq(damping=0.05).prepare(Moments(hessian))
    order = falling_diagonal(hessian)
    for position, column in enumerate(order):
        left = order[position:]
        inverse = np.linalg.inv(damped(hessian, 0.05)[np.ix_(left, left)])
        assert system.distortion_weight[column].item() == pytest.approx(1 / inverse[0, 0], rel=1e-5)


def test_nearest_weighs_an_error_by_the_hessian_diagonal_and_keeps_the_order():
    _, hessian = random_problem(rows=1, columns=5, seed=3)
    system = Nearest().prepare(Moments(hessian))
    assert system.order.tolist() == [0, 1, 2, 3, 4]
    assert system.distortion_weight.tolist() == hessian.diagonal().float().tolist()
    assert system.inverse_factor is None
    assert system.damping is None


@pytest.mark.case(36)
@pytest.mark.parametrize("act_order", [True, False])
def test_an_identity_hessian_leaves_nothing_to_compensate(act_order):
    weight, _ = random_problem(rows=31, columns=13, seed=4)
    hessian = torch.eye(13, dtype=torch.float64)
    gptq = solve(weight, hessian, recipe(solver=Gptq(act_order=act_order, block_size=4)))
    nearest = solve(weight, hessian, recipe(solver=Nearest()))
    assert torch.equal(gptq.quantized.codes, nearest.quantized.codes)
    assert torch.equal(gptq.quantized.dequantize(), nearest.quantized.dequantize())


@pytest.mark.case(36)
@pytest.mark.parametrize("bits", [2, 4])
def test_compensation_lowers_the_output_error_on_average(bits):
    errors = {"gptq": [], "nearest": []}
    for seed in range(12):
        problem = random_problem(rows=32, columns=24, seed=seed)
        for name, solver in {"gptq": Gptq(), "nearest": Nearest()}.items():
            chosen = recipe(precision=Fixed(bits), solver=solver)
            errors[name].append(solve(*problem, chosen).output_error)
    assert np.mean(errors["gptq"]) < 0.8 * np.mean(errors["nearest"])


def with_dead_inputs(hessian: torch.Tensor, dead: list[int]) -> torch.Tensor:
    hessian = hessian.clone()
    hessian[dead] = 0
    hessian[:, dead] = 0
    return hessian


def output_error(weight: torch.Tensor, hessian: torch.Tensor, dense: torch.Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) in float64."""
    exact = weight.double()
    difference = exact - dense.double()
    wrong = torch.trace(difference @ hessian @ difference.t())
    return (wrong / torch.trace(exact @ hessian @ exact.t())).item()


@pytest.mark.case(37)
@pytest.mark.parametrize("dead", [[], [2, 7]])
@pytest.mark.parametrize(
    "codebook",
    [KMeans(), KMeans(shared=True), KMeans(shared=True, row_scales=True), Uniform(5)],
    ids=str,
)
@pytest.mark.parametrize(
    "solver", [Gptq(block_size=4), Gptq(act_order=False, damping=0.3), Nearest()], ids=str
)
def test_reported_errors_are_those_recomputed_in_float64(solver, codebook, dead):
    weight, hessian = random_problem(rows=41, columns=14, seed=5)
    weight[:, dead] *= 1000  # what is never used may have any size
    hessian = with_dead_inputs(hessian, dead)
    solved = solve(weight, hessian, recipe(codebook=codebook, solver=solver))
    dense = solved.quantized.dequantize()
    assert solved.output_error == pytest.approx(output_error(weight, hessian, dense), rel=1e-4)
    difference = weight.double() - dense.double()
    share = (difference.square().sum() / weight.double().square().sum()).item()
    assert solved.weight_error == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize("codebook", [KMeans(), KMeans(row_scales=True)], ids=str)
def test_reserved_entries_are_in_the_reported_error(codebook):
    weight, hessian = random_problem(rows=41, columns=14, seed=6)
    weight[3, 2] = 2000.3
    chosen = recipe(codebook=codebook, reservation=FixedReservation(0.1))
    solved = solve(weight, hessian, chosen)
    dense = solved.quantized.dequantize()
    assert solved.output_error == pytest.approx(output_error(weight, hessian, dense), rel=1e-3)


def test_output_error_is_zero_for_a_layer_that_puts_out_nothing():
    hessian = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
    silent = solve(torch.tensor([[0.0, 5.1]]), hessian, recipe(precision=Fixed(1)))
    assert silent.output_error == 0.0
    assert silent.weight_error > 0.0


def plain_loop(
    work: np.ndarray, lower: np.ndarray, quantize: Callable[[int, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Every error reaches every later column at once: the errors, [in, out] float64."""
    work = work.astype(np.float64)
    for column in range(len(work)):
        error = (work[column] - quantize(column, work[column])) / lower[column, column]
        work[column + 1 :] -= np.outer(lower[column + 1 :, column], error)
        work[column] = error
    return work


class Shortened(ColumnQuantizer):
    """A quantizer that takes a part of every value off, and sees every column.

    Without steps there is no border that a rounding could push a value over.
    """

    def __init__(self, columns: int) -> None:
        self.seen: list[int] = []
        self.given = [np.zeros(0)] * columns

    @staticmethod
    def shortened(_: int, values: np.ndarray) -> np.ndarray:
        return values * 0.875

    def code_column(self, column, values):
        self.seen.append(column)
        self.given[column] = values.astype(np.float64)
        return self.shortened(column, values)


@pytest.mark.case(35)
@pytest.mark.parametrize("block_size", [1, 3, 7, 128])
@pytest.mark.parametrize("columns", [1, 6, 7, 8, 20, 21, 22, 127, 128, 129, 257])
def test_looking_ahead_changes_nothing(columns, block_size):
    weight, hessian = random_problem(rows=9, columns=columns, seed=columns)
    system = Gptq(block_size=block_size, damping=0.1).prepare(Moments(hessian))
    quantizer = Shortened(columns)
    loss = quantize_columns(weight, system, quantizer)
    order = system.order.numpy()
    ordered = weight.t().numpy()[order]
    lower = system.inverse_factor.t().numpy().astype(np.float64)
    expected = plain_loop(ordered, lower, Shortened.shortened)
    assert quantizer.seen == order.tolist()
    given = np.stack([quantizer.given[column] for column in order])
    errors = (given - Shortened.shortened(0, given)) / lower.diagonal()[:, None]
    assert errors == pytest.approx(expected, rel=0, abs=1e-4 * np.abs(expected).max())
    assert loss == pytest.approx((expected**2).sum(), rel=1e-4)


@pytest.mark.case(21)
@pytest.mark.parametrize("act_order", [True, False])
def test_a_dead_column_neither_takes_nor_gives_error(act_order):
    weight, hessian = random_problem(rows=25, columns=10, seed=6)
    dead, alive = [2, 7], [0, 1, 3, 4, 5, 6, 8, 9]
    without = hessian[alive][:, alive]
    order = falling_diagonal(without) if act_order else range(8)
    rule, _ = kmeans_rule(bits=3)
    expected, led = explicit_obs(weight[:, alive], damped(without, 0.01), order, rule)
    compensated = weight.double().numpy().copy()  # a dead column stays as it is
    compensated[:, alive] = led
    hessian = with_dead_inputs(hessian, dead)
    chosen = recipe(codebook=Led(KMeans(), compensated), solver=Gptq(act_order=act_order))
    whole = solve(weight, hessian, chosen)
    rounded = solve(weight, hessian, recipe(solver=Nearest()))
    assert whole.dead_columns == 2
    assert torch.equal(whole.quantized.codes[:, dead], rounded.quantized.codes[:, dead])
    dequantized = whole.quantized.dequantize()
    assert torch.equal(dequantized[:, dead], rounded.quantized.dequantize()[:, dead])
    assert np.array_equal(dequantized[:, alive].numpy(), expected)


@pytest.mark.case(20)
def test_an_all_zero_hessian_rounds_every_column_to_nearest():
    weight, _ = random_problem(rows=25, columns=6, seed=8)
    hessian = torch.zeros(6, 6, dtype=torch.float64)
    solved = solve(weight, hessian, recipe())
    rounded = solve(weight, hessian, recipe(solver=Nearest()))
    assert torch.equal(solved.quantized.dequantize(), rounded.quantized.dequantize())
    assert solved.dead_columns == rounded.dead_columns == 6
    assert (solved.nearest, rounded.nearest) == ("unfed", "")
    assert solved.output_error == 0.0
    assert 0 < solved.weight_error < 0.1


@pytest.mark.case(22)
def test_duplicated_inputs_are_compensated_by_one_another():
    weight, hessian = random_problem(rows=40, columns=8, seed=9)
    twice = torch.arange(16) % 8
    weight = torch.cat([weight, weight.flip(1)], dim=1)
    hessian = hessian[twice][:, twice]
    solved = solve(weight, hessian, recipe())
    rounded = solve(weight, hessian, recipe(solver=Nearest()))
    assert torch.linalg.matrix_rank(hessian) == 8
    assert solved.damping == 0.01
    assert solved.output_error < 0.5 * rounded.output_error


@pytest.mark.case(22)
def test_fewer_tokens_than_inputs_still_give_a_finite_result():
    weight, hessian = random_problem(rows=20, columns=16, seed=10, tokens=3)
    solved = solve(weight, hessian, recipe())
    assert torch.isfinite(solved.quantized.dequantize()).all()
    assert math.isfinite(solved.output_error)


@pytest.mark.case(22, 27)
@settings(max_examples=80)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 20),
    tokens=st.integers(1, 30),
    distinct=st.integers(1, 20),
    exponent=st.integers(-6, 6),
    bits=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_inputs_of_any_rank_and_size_give_a_finite_matrix_and_an_error_below_one(
    rows, columns, tokens, distinct, exponent, bits, seed
):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    inputs = inputs[:, torch.arange(columns) % distinct] * 10.0**exponent  # equal columns
    inputs[:, torch.rand(columns, generator=generator) < 0.1] = 0  # dead ones
    weight = torch.randn(rows, columns, generator=generator)
    solved = solve(weight, inputs.t() @ inputs, recipe(precision=Fixed(bits)))
    assert torch.isfinite(solved.quantized.dequantize()).all()
    assert 0 <= solved.output_error < 1.5
    assert solved.dead_columns == int((inputs == 0).all(dim=0).sum())
    assert not solved.raised
    if rows <= 2**bits:
        assert solved.output_error < 1e-5


@pytest.mark.case(22, 23)
@pytest.mark.parametrize(
    ("smallest", "damping", "used"),
    [(0.1, 0.01, 0.01), (-0.03, 0.01, 0.1), (-0.3, 0.01, 1.0), (-0.7, 0.5, 1.0)],
)
def test_damping_rises_until_the_hessian_is_positive_definite_and_is_recorded(
    smallest, damping, used
):
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.manual_seed(0)).double()).Q
    spectrum = torch.tensor([smallest, 0.5, 1.0, 1.0, 1.5, 0.0], dtype=torch.float64)
    spectrum[5] = 6 - spectrum.sum()  # a mean diagonal of one
    hessian = rotation @ torch.diag(spectrum) @ rotation.t()
    weight, _ = random_problem(rows=10, columns=6, seed=11)
    solved = solve(weight, hessian, recipe(solver=Gptq(damping=damping)))
    assert solved.damping == pytest.approx(used)
    assert solved.raised == (used > damping)
    assert torch.isfinite(solved.quantized.dequantize()).all()


@pytest.mark.case(23)
@pytest.mark.parametrize(
    "diagonal", [[1.0, 1.0, -5.0], [-1.0, -1.0, -1.0], [1.0, -1.0, 0.0]], ids=str
)
def test_an_indefinite_hessian_is_refused_with_its_smallest_eigenvalue(diagonal):
    hessian = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    with pytest.raises(NumericalError, match="positive definite") as caught:
        Gptq().prepare(Moments(hessian))
    assert "eigenvalue -" in str(caught.value)
    assert "solver.damping" in str(caught.value)


def test_a_hessian_with_nan_is_refused():
    hessian = torch.eye(3, dtype=torch.float64)
    hessian[1, 2] = hessian[2, 1] = math.nan
    with pytest.raises(NumericalError, match="Hessian"):
        LinearProblem(torch.ones(2, 3), hessian)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [90, 700])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_preparing_in_the_memory_of_the_hessian_finds_the_same(
    act_order, columns, transposed, wide
):
    _, hessian = random_problem(rows=1, columns=columns, seed=13)
    hessian = with_dead_inputs(hessian, [4, 70])
    hessian = (hessian + hessian.t()) / 2  # to the last bit
    solver = Gptq(act_order=act_order)
    expected = solver.prepare(Moments(hessian, wide=wide))
    own = hessian.clone()
    given = Moments(own.t() if transposed else own, disposable=True, wide=wide)
    found = solver.prepare(given)
    for part in ("order", "inverse_factor", "distortion_weight", "added", "dead"):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part
    assert torch.equal(own, hessian) == transposed
    assert given.used_up


@pytest.mark.case(23)
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [90, 700])
def test_a_hessian_that_is_refused_is_as_it_was(columns, act_order):
    _, hessian = random_problem(rows=1, columns=columns, seed=14)
    hessian = with_dead_inputs(hessian, [4, 70])
    hessian = (hessian + hessian.t()) / 2
    hessian[5, 5] = -2 * hessian.diagonal().sum()
    own = hessian.clone()
    moments = Moments(own, disposable=True)
    with pytest.raises(NumericalError, match="positive definite"):
        Gptq(act_order=act_order).prepare(moments)
    assert torch.equal(own, hessian)


def test_preparing_leaves_the_hessian_as_it_was():
    _, hessian = random_problem(rows=1, columns=6, seed=12)
    hessian = with_dead_inputs(hessian, [1])
    before = hessian.clone()
    Gptq().prepare(Moments(hessian))
    Nearest().prepare(Moments(hessian))
    assert torch.equal(hessian, before)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"block_size": 0}, "solver.block_size"),
        ({"damping": 0.0}, "solver.damping"),
        ({"damping": 1.5}, "solver.damping"),
        ({"damping": math.nan}, "solver.damping"),
    ],
)
def test_impossible_options_are_refused_by_name(options, name):
    with pytest.raises(ConfigError, match=name):
        Gptq(**options)
