"""The compiled column loop, piece by piece against numpy, and whole against a float64 loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import fitted, random_problem, recipe, solve, squared_error

from claq_exp.payload.column_codebooks import ColumnCodebooks, ColumnCodebooksLayout
from claq_exp.quantize.allocation import ColumnPlan, MatrixPlan
from claq_exp.quantize.codebook import CODEBOOK, Codebook, KMeans
from claq_exp.quantize.codebook.affine import fit_scale_and_shift
from claq_exp.quantize.codebook.basics import choose_reserved, round_half
from claq_exp.quantize.codebook.clustering import fit_levels
from claq_exp.quantize.codebook.columns import CompiledColumns, PythonColumns
from claq_exp.quantize.codebook.compiled import (
    ABSMAX,
    EXACT,
    FITTED,
    KMEANS,
    QUANTILES,
    RANGE,
    column_distortions,
)
from claq_exp.quantize.codebook.exact import fit_levels_exact, fit_quantiles
from claq_exp.quantize.codebook.kmeans import shared_codebooks
from claq_exp.quantize.codebook.simple import normal_float
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import quantize_weight
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import Gptq, Nearest
from claq_exp.quantize.solver.columns import NOTHING
from claq_exp.quantize.solver.compiled import compensate, quantize_block
from claq_exp.quantize.statistics import ColumnStatistics

QUICK = settings(max_examples=100)
OWN_FITS = {KMEANS: fit_levels, EXACT: fit_levels_exact, QUANTILES: fit_quantiles}


def as_half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    return np.array([round_half(value) for value in values.astype(np.float32)], dtype=np.float32)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@settings(max_examples=400)
@given(st.floats(width=32, allow_nan=False))
def test_rounding_to_float16_is_that_of_numpy(value):
    values = np.array([value, -value], dtype=np.float32)
    assert_same_bits(rounded(values), as_half(values))


def test_rounding_is_that_of_numpy_at_every_float16_every_tie_and_beside_them():
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = np.append((halves[:-1] + halves[1:]) / 2, np.float32(65520))
    single = np.concatenate([halves, ties])
    around = [np.nextafter(single, np.float32(limit)) for limit in (-np.inf, np.inf)]
    values = np.concatenate([single, *around])
    values = np.concatenate([values, -values])
    assert_same_bits(rounded(values), as_half(values))


@pytest.mark.parametrize("value", [65519.996, 65520.0, 1e5, 1e36, 3.4e38, np.inf, -0.0, 1e-45])
def test_rounding_at_the_ends_of_both_formats(value):
    values = np.array([value, -value], dtype=np.float32)
    assert_same_bits(rounded(values), as_half(values))


def sorted_choice(values: np.ndarray, count: int, tails: bool) -> list[int]:
    """The rows to keep, by sorting: largest key first, ties to the lower row."""
    if not tails:
        return sorted(np.argsort(-np.abs(values), kind="stable")[:count].tolist())
    high = np.argsort(-values, kind="stable")[: (count + 1) // 2].tolist()
    rest = [row for row in np.argsort(values, kind="stable").tolist() if row not in high]
    return sorted(high + rest[: count // 2])


@QUICK
@given(
    st.lists(
        st.one_of(st.integers(-5, 5).map(float), st.floats(-(2.0**99), 2.0**99, width=32)),
        min_size=1,
        max_size=40,
    ).flatmap(lambda values: st.tuples(st.just(values), st.integers(0, len(values)))),
    st.booleans(),
)
def test_the_kept_rows_are_those_of_a_sort_with_ties_to_the_lower_row(case, tails):
    values = np.array(case[0], dtype=np.float32)
    chosen = np.ones(len(values), dtype=bool)
    choose_reserved(values, case[1], tails, chosen)
    assert np.flatnonzero(chosen).tolist() == sorted_choice(values, case[1], tails)


@pytest.mark.parametrize("position", [0, 1, 3, 4, 5, 8, 11])
def test_compensation_subtracts_the_errors_of_all_earlier_columns(position):
    generator = np.random.default_rng(position)
    values = generator.normal(size=(12, 37)).astype(np.float32)
    lower = generator.normal(size=(12, 12)).astype(np.float32)
    expected = values.astype(np.float64)
    expected[position] -= lower[position, :position].astype(np.float64) @ expected[:position]
    compensate(values, lower, position)
    assert values == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_in_tails_mode_both_ends_of_a_column_are_kept():
    weight, hessian = random_problem(rows=40, columns=5, seed=1)
    weight[:3, 2] = torch.tensor([50.0, 40.0, 30.0])
    counts = torch.full((5,), 5)
    plan = MatrixPlan(KMeans(), ColumnPlan(Fixed(2).plan(flat(weight)), counts, "tails"))
    problem = LinearProblem(weight, hessian)
    result = quantize_weight(problem, Nearest().prepare(Moments(hessian)), recipe(), plan).quantized
    for column in range(5):
        mine = result.reserved.columns() == column
        expected = sorted_choice(weight[:, column].numpy(), 5, tails=True)
        assert result.reserved.rows[mine].tolist() == expected
        assert torch.equal(result.reserved.values[mine], weight[expected, column].half())


def flat(weight: torch.Tensor, row_weights: torch.Tensor | None = None) -> ColumnStatistics:
    return ColumnStatistics(weight, torch.ones(weight.shape[1]), row_weights)


BOOKS = {
    FITTED: lambda statistics, bits: shared_codebooks(statistics, bits, None),
    RANGE: lambda _, bits: {w: torch.arange(2.0**w) for w in bits.unique().tolist()},
    ABSMAX: lambda _, bits: {w: normal_float(w) for w in bits.unique().tolist()},
}


def expected_column(single, width, count, rule, book, weights):
    """A column's codes and what they stand for; only the fit itself is the package's."""
    kept = sorted_choice(single, count, tails=False)
    given_weights = weights.copy()
    given_weights[kept] = 0
    if rule in OWN_FITS:
        levels = as_half(fitted(OWN_FITS[rule], single, 2**width, given_weights).astype(np.float32))
    else:
        book = book.half().float().numpy()
        pair = fit_scale_and_shift(single, given_weights, book, rule - FITTED)
        scale, shift = as_half(np.array(pair, dtype=np.float32))
        levels = scale * book + shift
    distances = np.abs(single.astype(np.float64)[:, None] - levels.astype(np.float64))
    codes = distances.argmin(axis=1)
    codes[kept] = 0
    quantized = levels[codes]
    quantized[kept] = as_half(single[kept])
    return codes, quantized


BITS = torch.tensor([3, 2, 4, 1, 3, 2, 4, 2, 3, 1, 2], dtype=torch.uint8)
COUNTS = torch.arange(11) % 4


def dequantized(quantizer: CompiledColumns) -> np.ndarray:
    """What codes and reserved entries stand for: [in, out]."""
    found = quantizer.payload()
    dense = found.levels().gather(1, found.codes.t().long())
    reserved = found.reserved
    dense[reserved.columns(), reserved.rows] = reserved.values.float()
    return dense.numpy()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rule", [KMEANS, EXACT, QUANTILES, FITTED, RANGE, ABSMAX])
def test_a_step_of_the_loop_is_that_of_numpy(rule, weighted):
    weight, _ = random_problem(rows=45, columns=11, seed=rule)
    row_weights = torch.rand(45, generator=torch.manual_seed(0)) + 0.1 if weighted else None
    statistics = flat(weight, row_weights)
    books = BOOKS[rule](statistics, BITS) if rule in BOOKS else None
    quantizer = CompiledColumns(statistics, ColumnPlan(BITS, COUNTS), rule, books=books)
    columns, codes, quantized = weight.t().contiguous().numpy(), [], []
    importance = statistics.importance().numpy()
    for column, single in enumerate(columns):
        width, count = int(BITS[column]), int(COUNTS[column])
        book = books[width] if books else None
        found = expected_column(single, width, count, rule, book, importance)
        codes.append(found[0].tolist())
        quantized.append(found[1])
        assert np.array_equal(quantizer.code_column(column, single), found[1])
        errors, divisor = single[None].copy(), np.full((1, 1), 0.7, dtype=np.float32)
        quantize_block(errors, divisor, np.array([column]), quantizer.compiled(), NOTHING)
        assert np.array_equal(errors[0], (single - found[1]) / divisor[0, 0])
    assert quantizer.payload().codes.t().tolist() == codes
    assert np.array_equal(dequantized(quantizer), quantized)


@pytest.mark.parametrize("rule", [KMEANS, EXACT, QUANTILES])
def test_a_block_of_the_loop_is_the_steps_one_after_the_other(rule):
    # so few digits that every sum is exact: no order of adding changes what is fitted
    generator = np.random.default_rng(rule)
    work = generator.integers(256, 1024, (11, 45)) / 256
    below = np.tril(generator.integers(-1, 2, (11, 11)), -1)
    lower = below + np.diag([1.0, 2, 1, 1, 2, 1, 1, 2, 1, 1, 1])
    statistics = flat(torch.from_numpy(work.T.copy()).float())
    quantizer = CompiledColumns(statistics, ColumnPlan(BITS, COUNTS), rule)
    values = work.astype(np.float32)
    quantize_block(values, lower.astype(np.float32), np.arange(11), quantizer.compiled(), NOTHING)
    quantized = np.empty_like(work)
    for column in range(11):
        work[column] -= lower[column, :column] @ work[:column]
        single = work[column].astype(np.float32)
        assert np.array_equal(single, work[column])
        width, count = int(BITS[column]), int(COUNTS[column])
        ones = np.ones(45, dtype=np.float32)
        _, quantized[column] = expected_column(single, width, count, rule, None, ones)
        work[column] = (work[column] - quantized[column]) / lower[column, column]
    assert np.array_equal(values, work)
    assert np.array_equal(dequantized(quantizer), quantized)


class MyKMeans(Codebook):
    """A codebook of one's own in Python, with the package's fit."""

    mixed_widths = True
    reserves = True

    def layout(self, rows: int, plan: ColumnPlan) -> ColumnCodebooksLayout:
        return ColumnCodebooksLayout.of(rows, plan.column_bits, plan.reserved_counts)

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> PythonColumns:
        return MyColumns(statistics, plan)


class MyColumns(PythonColumns):
    def __init__(self, statistics: ColumnStatistics, plan: ColumnPlan) -> None:
        super().__init__(statistics, plan)
        self.bits = plan.column_bits.tolist()
        self.books = torch.zeros(len(self.bits), 2 ** max(self.bits), dtype=torch.float16)

    def quantize(self, column, values, reserved):
        weights = np.ones(len(values), dtype=np.float32)
        weights[reserved] = 0
        levels = fitted(fit_levels, values, 2 ** self.bits[column], weights).astype(np.float16)
        self.books[column, : len(levels)] = torch.from_numpy(levels)
        codes = np.abs(values[:, None] - levels.astype(np.float32)).argmin(axis=1)
        return codes.astype(np.uint8), levels[codes].astype(np.float32)

    def payload(self):
        return ColumnCodebooks(*self.coded(), self.books)


@pytest.mark.parametrize("solver", [Gptq(block_size=4), Nearest()])
def test_a_quantizer_in_python_gives_what_the_compiled_one_gives(solver):
    problem = random_problem(rows=40, columns=13, seed=5)
    changes = {"reservation": FixedReservation(0.06), "solver": solver}
    mine = solve(*problem, recipe(codebook=MyKMeans(), **changes))
    theirs = solve(*problem, recipe(codebook=KMeans(), **changes))
    for suffix, tensor in theirs.quantized.pack().items():
        assert torch.equal(mine.quantized.pack()[suffix], tensor), suffix
    assert mine.output_error == theirs.output_error


OPTIONS = np.array([(w, c) for c in (0, 1, 5) for w in (1, 2, 3, 5)], dtype=np.int64)


@pytest.mark.parametrize("rule", [KMEANS, EXACT, FITTED])
def test_column_distortions_are_the_weighted_errors_of_direct_fits(rule):
    weight, _ = random_problem(rows=90, columns=6, seed=6)
    importance = torch.rand(90, generator=torch.manual_seed(1)).numpy()
    bits = torch.tensor([1, 2, 3, 5], dtype=torch.uint8)
    books = np.zeros((9, 256), dtype=np.float32)
    for width, book in shared_codebooks(flat(weight), bits, None).items():
        books[width, : len(book)] = book.half().float().numpy()
    values = weight.t().contiguous().numpy()
    free = np.zeros(0, dtype=np.float32)
    found = column_distortions(values, importance, OPTIONS, rule, books, free)
    for column, current in enumerate(values):
        for at, (width, count) in enumerate(OPTIONS.tolist()):
            weights = importance.copy()
            weights[sorted_choice(current, count, tails=False)] = 0
            if rule in OWN_FITS:
                levels = as_half(fitted(OWN_FITS[rule], current, 2**width, weights))
            else:
                book = books[width, : 2**width]
                pair = fit_scale_and_shift(current, weights, book, rule - FITTED)
                scale, shift = as_half(np.array(pair))
                levels = scale * book + shift
            expected = squared_error(current, levels, weights.astype(np.float64))
            assert found[column, at] == pytest.approx(expected, rel=1e-5)


VARIANTS = [
    KMeans(),
    KMeans(fit_reserved=True),
    KMeans(shared=True),
    KMeans(row_scales=True),
    KMeans(shared=True, row_scales=True),
    KMeans(snap="apot"),
    KMeans(snap="grid", snap_bits=6, row_scales=True),
    *(CODEBOOK[name]() for name in ("kmeans_exact", "quantile")),
]


def planned(codebook, weight, row_weights, distortion=None, reserved=2):
    """Quantize without compensation, with these weights of rows and columns."""
    columns = weight.shape[1]
    counts = torch.full((columns,), reserved)
    plan = ColumnPlan(torch.full((columns,), 3, dtype=torch.uint8), counts)
    hessian = torch.diag(torch.ones(columns) if distortion is None else distortion).double()
    problem = LinearProblem(weight, hessian)
    whole = MatrixPlan(codebook, plan, row_weights)
    return quantize_weight(problem, Nearest().prepare(Moments(hessian)), recipe(), whole).quantized


@pytest.mark.parametrize("codebook", VARIANTS, ids=str)
@pytest.mark.parametrize("factor", [2.0**-60, 8.0])
def test_only_the_relation_of_row_weights_counts(codebook, factor):
    weight, _ = random_problem(rows=60, columns=9, seed=7)
    row_weights = torch.rand(60, generator=torch.manual_seed(2)) + 0.01
    plain = planned(codebook, weight, row_weights)
    scaled = planned(codebook, weight, row_weights * factor)
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.dequantize(), scaled.dequantize())


@pytest.mark.parametrize("codebook", [KMeans(), VARIANTS[-2], VARIANTS[-1]])
def test_a_row_without_weight_does_not_move_the_levels(codebook):
    weight, _ = random_problem(rows=60, columns=9, seed=8)
    row_weights = torch.ones(60)
    row_weights[17] = 0
    without = torch.cat([weight[:17], weight[18:]])
    found = planned(codebook, weight, row_weights, reserved=0).values
    expected = planned(codebook, without, torch.ones(59), reserved=0).values
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-2, abs=1e-2)


def test_a_heavy_row_is_met_exactly():
    weight, _ = random_problem(rows=60, columns=9, seed=9)
    row_weights = torch.ones(60)
    row_weights[17] = 1e9
    dense = planned(KMeans(), weight, row_weights, reserved=0).dequantize()
    assert dense[17].numpy() == pytest.approx(weight[17].numpy(), rel=1e-3)


@pytest.mark.parametrize("codebook", [KMeans(), KMeans(row_scales=True), VARIANTS[-1]])
def test_what_a_column_weighs_cannot_change_its_own_codebook(codebook):
    weight, _ = random_problem(rows=60, columns=9, seed=10)
    first = planned(codebook, weight, None, torch.ones(9))
    second = planned(codebook, weight, None, torch.arange(1.0, 10.0))
    assert torch.equal(first.dequantize(), second.dequantize())


def test_reserved_entries_take_part_in_the_fit_only_where_that_is_asked():
    weight, _ = random_problem(rows=60, columns=4, seed=11)
    weight[5] = 30.0
    apart = planned(KMeans(), weight, None, reserved=1).values
    together = planned(KMeans(fit_reserved=True), weight, None, reserved=1).values
    assert (apart.max(dim=1).values < 10).all()
    assert (together.max(dim=1).values == 30).all()


@pytest.mark.parametrize("shared", [False, True])
def test_row_scales_divide_rows_by_their_root_mean_square(shared):
    weight, _ = random_problem(rows=60, columns=20, seed=12)
    weight *= 2.0 ** torch.arange(-30, 30)[:, None].div(6)
    weight[3] = 0
    scaled = planned(KMeans(shared=shared, row_scales=True), weight, None, reserved=0)
    plain = planned(KMeans(shared=shared), weight, None, reserved=0)
    expected = np.sqrt((weight.double().numpy() ** 2).mean(axis=1))
    expected[3] = 1
    scales = scaled.row_scales
    assert scales.dtype == torch.float16
    assert scales.numpy() == pytest.approx(expected, rel=1e-3)
    relative = ((scaled.dequantize() - weight) / scales.float()[:, None]).square().mean()
    assert (
        relative < 0.5 * ((plain.dequantize() - weight) / scales.float()[:, None]).square().mean()
    )


def test_a_shared_codebook_from_constant_columns_leaves_means():
    weight, hessian = torch.full((30, 200), 0.5), torch.eye(200, dtype=torch.float64)
    learned = torch.linspace(0, 199, 64).round().long().unique()
    others = [column for column in range(200) if column not in learned]
    weight[:, others] = random_problem(rows=30, columns=len(others), seed=0)[0]
    dense = solve(weight, hessian, recipe(codebook=KMeans(shared=True))).quantized.dequantize()
    means = weight[:, others].mean(dim=0).expand(30, -1)
    assert dense[:, others].numpy() == pytest.approx(means.numpy(), abs=1e-3)
