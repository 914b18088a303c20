"""Stretching a given codebook to a column: least squares, range, largest magnitude, NormalFloat."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import fitted, random_problem, recipe, solve, squared_error
from scipy.optimize import minimize

from claq_exp.quantize.codebook import NormalFloat, UniformColumn
from claq_exp.quantize.codebook.affine import ABSMAX, FITTED, RANGE, fit_scale_and_shift
from claq_exp.quantize.codebook.clustering import fit_levels
from claq_exp.quantize.codebook.simple import normal_float
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.solver import Nearest

QUICK = settings(max_examples=80)
# bitsandbytes' table of NF4
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
columns = st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=50).map(
    lambda values: np.array(values, dtype=np.float32)
)
ONE = np.ones(1, dtype=np.float32)


def ones(values: np.ndarray) -> np.ndarray:
    return np.ones(len(values), dtype=np.float32)


def stretched_error(pair, values, book, weights) -> float:
    return squared_error(values, pair[0] * book.astype(np.float64) + pair[1], weights)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "student_t", "lopsided"])
def test_the_fit_comes_close_to_the_least_squares_of_many_starts(width, kind):
    generator = np.random.default_rng(width)
    draw = {
        "normal": lambda count: generator.normal(size=count),
        "student_t": lambda count: generator.standard_t(4, size=count) * 1e-3 + 0.02,
        "lopsided": lambda count: generator.exponential(size=count) * 7 - 3,
    }[kind]
    many = draw(8000).reshape(64, -1)  # a shared codebook is learned from normalised columns
    many = (many - many.mean(axis=1, keepdims=True)) / many.std(axis=1, keepdims=True)
    book = fitted(fit_levels, many.ravel().astype(np.float32), 2**width).astype(np.float32)
    ratios = []
    for _ in range(5):
        values = draw(120).astype(np.float32)
        weights = generator.exponential(size=120).astype(np.float32)
        found = stretched_error(
            fit_scale_and_shift(values, weights, book, FITTED), values, book, weights
        )
        best = found
        size = values.std() / book.std()
        for scale in size * np.array([0.5, 0.7, 0.85, 1.0, 1.2, 1.5]):
            for shift in np.quantile(values, [0.3, 0.5, 0.7]) - scale * book.mean():
                start = minimize(
                    stretched_error,
                    (scale, shift),
                    (values, book, weights),
                    method="Nelder-Mead",
                    options={"maxfev": 120},
                )
                best = min(best, start.fun)
        ratios.append(found / best)
    assert np.mean(ratios) < (1.1 if width < 4 else 1.25)


@QUICK
@given(columns, st.integers(0, 100))
def test_scale_and_shift_are_least_squares_for_the_cells_that_they_make(values, seed):
    book = np.sort(np.random.default_rng(seed).normal(size=8)).astype(np.float32)
    scale, shift = fit_scale_and_shift(values, ones(values), book, FITTED)
    assert scale >= 0
    levels = scale * book.astype(np.float64) + shift
    mean = squared_error(values, [values.astype(np.float64).mean()])
    assert squared_error(values, levels) <= mean * (1 + 1e-6) + 1e-6


@pytest.mark.parametrize("scale", [0.003, 1.0, 40.0])
def test_a_column_of_stretched_levels_is_met_exactly(scale):
    book = np.array([-1.5, -0.5, 0.25, 2.0], dtype=np.float32)
    values = np.repeat(np.float32(scale) * book + np.float32(scale), 30)
    found = fit_scale_and_shift(values, ones(values), book, FITTED)
    assert found == pytest.approx((scale, scale), rel=1e-5)


@pytest.mark.parametrize("rule", [FITTED, RANGE, ABSMAX])
def test_stretching_follows_the_column(rule):
    generator = np.random.default_rng(0)
    values, book = generator.normal(size=300).astype(np.float32), normal_float(3).numpy()
    scale, shift = fit_scale_and_shift(values, ones(values), book, rule)
    scaled = fit_scale_and_shift(values * np.float32(8), ones(values), book, rule)
    assert scaled == pytest.approx((8 * scale, 8 * shift), rel=1e-6)


@QUICK
@given(columns)
def test_range_puts_the_ends_of_the_book_on_the_ends_of_the_column(values):
    book = np.array([-3.0, 0.0, 1.0, 5.0], dtype=np.float32)
    scale, shift = fit_scale_and_shift(values, ones(values), book, RANGE)
    low, high = float(values.min()), float(values.max())
    slack = 1e-6 * max(abs(low), abs(high))
    assert scale * -3.0 + shift == pytest.approx(low, abs=slack)
    assert scale * 5.0 + shift == pytest.approx(high, abs=slack)


@QUICK
@given(columns)
def test_absmax_puts_the_largest_magnitude_on_the_books_largest(values):
    book = np.array([-3.0, 0.0, 1.0, 5.0], dtype=np.float32)
    scale, shift = fit_scale_and_shift(values, ones(values), book, ABSMAX)
    assert 5.0 * scale == pytest.approx(float(np.abs(values).max()), rel=1e-6)
    assert shift == 0.0


@pytest.mark.parametrize("rule", [FITTED, RANGE, ABSMAX])
def test_what_has_no_weight_does_not_count(rule):
    generator = np.random.default_rng(1)
    values, book = generator.normal(size=300).astype(np.float32), normal_float(3).numpy()
    alone = fit_scale_and_shift(values, ones(values), book, rule)
    joined = np.append(values, np.float32(20))
    found = fit_scale_and_shift(joined, np.append(ones(values), 0 * ONE), book, rule)
    errors = [stretched_error(pair, values, book, ones(values)) for pair in (found, alone)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    if rule != FITTED:
        assert found == alone
    nothing = fit_scale_and_shift(values, 0 * values, book, rule)
    assert nothing == (0.0, 0.0)


@pytest.mark.parametrize("rule", [FITTED, RANGE])
def test_a_constant_column_is_its_shift(rule):
    values = np.full(9, 0.625, dtype=np.float32)
    assert fit_scale_and_shift(values, ones(values), normal_float(2).numpy(), rule) == (0.0, 0.625)


def test_a_book_of_one_value_gives_the_mean():
    values = np.array([1.0, 2.0, 6.0], dtype=np.float32)
    found = fit_scale_and_shift(values, ones(values), np.full(4, 2.5, dtype=np.float32), FITTED)
    assert found == pytest.approx((0.0, 3.0))


def test_four_bits_of_normal_float_are_the_published_table():
    assert normal_float(4).numpy() == pytest.approx(NF4, abs=1e-6)


@pytest.mark.parametrize("width", range(1, 9))
def test_normal_float_ascends_from_minus_one_to_one_through_zero(width):
    levels = normal_float(width).numpy()
    assert levels.shape == (2**width,)
    assert (np.diff(levels) > 0).all()
    assert (levels[0], levels[-1]) == (-1, 1)
    assert width == 1 or levels[2 ** (width - 1) - 1] == 0


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_normal_float_columns_are_the_table_times_the_largest_entry(bits):
    weight, hessian = random_problem(rows=80, columns=6, seed=bits)
    chosen = recipe(codebook=NormalFloat(), precision=Fixed(bits), solver=Nearest())
    result = solve(weight, hessian, chosen).quantized
    levels = result.levels()
    largest = weight.abs().amax(dim=0)
    expected = (largest[:, None] * normal_float(bits)).numpy()
    assert levels.numpy() == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_uniform_columns_are_even_steps_from_the_smallest_to_the_largest_entry(bits):
    weight, hessian = random_problem(rows=80, columns=6, seed=bits)
    chosen = recipe(codebook=UniformColumn(), precision=Fixed(bits), solver=Nearest())
    result = solve(weight, hessian, chosen).quantized
    levels = result.levels().numpy()
    for column, values in enumerate(weight.t().numpy()):
        expected = np.linspace(values.min(), values.max(), 2**bits)
        assert levels[column] == pytest.approx(expected, abs=5e-3)
