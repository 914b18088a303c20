"""The GPU column loop against the CPU's, against float64, and where answers are exact."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from claq_exp.errors import ConfigError, NumericalError
from claq_exp.payload import ColumnCodebooks, unpack_weight
from claq_exp.quantize.allocation import ColumnPlan, MatrixPlan
from claq_exp.quantize.codebook import KMeans, Uniform
from claq_exp.quantize.codebook.clustering import fit_levels
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, decide, quantize_weight
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Gptq, Nearest
from claq_exp.quantize.solver.base import describe
from claq_exp.quantize.solver.columns import ColumnSystem
from claq_exp.quantize.solver.device import solve_on_device
from claq_exp.quantize.solver.device_columns import SUB_BLOCK, quantize_group_on_device

PLAIN = Recipe(KMeans(), Fixed(3), NoReservation(), Gptq())


def plain_system(columns: int) -> ColumnSystem:
    """Visit the columns as they stand, without compensation."""
    return Nearest().prepare(Moments(torch.eye(columns, dtype=torch.float64)))


def correlated_hessian(columns: int, seed: int) -> Tensor:
    """Hessian of inputs that share a few directions: [columns, columns] float64."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(8 * columns, 3, generator=generator, dtype=torch.float64)
    own = torch.randn(8 * columns, columns, generator=generator, dtype=torch.float64)
    inputs = own + shared @ torch.randn(3, columns, generator=generator, dtype=torch.float64)
    return 2 / len(inputs) * inputs.t() @ inputs


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def widths(columns: int, bits: int) -> Tensor:
    return torch.full((columns,), bits, dtype=torch.uint8)


def counts(columns: int, count: int) -> Tensor:
    return torch.full((columns,), count, dtype=torch.int64)


def one(weight: Tensor, system: ColumnSystem, bits: int, reserved: int, device: str):
    columns = weight.shape[1]
    (result,) = quantize_group_on_device(
        [weight], system, [widths(columns, bits)], [counts(columns, reserved)], device
    )
    return result


def cpu_solution(problem: LinearProblem, system: ColumnSystem, bits: Tensor, reserved: Tensor):
    plan = MatrixPlan(KMeans(), ColumnPlan(bits, reserved))
    return quantize_weight(problem, system, PLAIN, plan)


def fit(values: np.ndarray, entries: int) -> np.ndarray:
    """The CPU's levels of one column."""
    levels = np.empty(entries)
    fit_levels(values.astype(np.float32), np.ones(len(values), dtype=np.float32), levels)
    return levels


def level_values(result: ColumnCodebooks) -> np.ndarray:
    assert isinstance(result, ColumnCodebooks)
    return result.values.float().numpy()


def reserved_rows(result: ColumnCodebooks, column: int) -> list[int]:
    ends = result.reserved.counts.cumsum(0)
    start = int(ends[column] - result.reserved.counts[column])
    return result.reserved.rows[start : int(ends[column])].tolist()


def squared_error(values: np.ndarray, levels: np.ndarray, weights: float | np.ndarray = 1.0):
    """Weighted squared distance of every value to its nearest level, in float64."""
    distance = values.astype(np.float64)[:, None] - np.asarray(levels, np.float64)[None, :]
    return float((weights * (distance**2).min(axis=1)).sum())


DRAW = {
    "gaussian": lambda random, rows: random.standard_normal(rows),
    "laplace": lambda random, rows: random.laplace(size=rows),
    "student": lambda random, rows: random.standard_t(4, rows),
    "outliers": lambda random, rows: np.r_[random.standard_t(4, rows - 3), 60, -45, 80],
}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codebooks_are_as_good_as_those_of_the_cpu(device, bits):
    rows = (192, 500)
    weights = [
        0.02 * np.stack([draw(np.random.default_rng(n), n) for draw in DRAW.values()], axis=1)
        for n in rows
    ]
    results = quantize_group_on_device(
        [torch.from_numpy(weight).float() for weight in weights],
        plain_system(len(DRAW)),
        [widths(len(DRAW), bits)] * 2,
        [counts(len(DRAW), 0)] * 2,
        device,
    )
    excess = []
    for weight, result in zip(weights, results, strict=True):
        single = weight.astype(np.float32)
        for column, levels in enumerate(level_values(result)):
            best = fit(single[:, column], 2**bits).astype(np.float16)
            error = ((weight[:, column] - result.dequantize()[:, column].numpy()) ** 2).sum()
            assert error == pytest.approx(squared_error(single[:, column], levels), rel=1e-4)
            excess.append(error / squared_error(single[:, column], best) - 1)
    assert np.mean(excess) < 0.01
    assert np.max(excess) < 0.03


def weighted_optimum(values: np.ndarray, weights: np.ndarray, entries: int) -> float:
    """The least weighted squared error of `entries` cells, by a dynamic program in float64."""
    order = np.argsort(values)
    value, weight = values[order].astype(np.float64), weights[order].astype(np.float64)
    mass, total, square = (
        np.r_[0, np.cumsum(weight * power)] for power in (np.ones_like(value), value, value**2)
    )

    def cell(left: np.ndarray, right: int) -> np.ndarray:
        inside = mass[right] - mass[left]
        return square[right] - square[left] - (total[right] - total[left]) ** 2 / inside

    best = np.r_[0, [cell(np.zeros(1, int), right)[0] for right in range(1, len(value) + 1)]]
    for _ in range(entries - 1):
        best = np.r_[
            0,
            [
                (best[:right] + cell(np.arange(right), right)).min()
                for right in range(1, len(value) + 1)
            ],
        ]
    return float(best[-1])


@pytest.mark.parametrize(("scaled", "weighted"), [(True, False), (False, True), (True, True)])
def test_scales_and_weights_of_rows_enter_the_codebook(device, scaled, weighted):
    random = np.random.default_rng(5)
    scales = np.exp(random.standard_normal(150)).astype(np.float16) if scaled else np.ones(150)
    scales = scales.astype(np.float32)  # as they are stored
    prices = np.exp(random.standard_normal(150)).astype(np.float32) if weighted else np.ones(150)
    weight = torch.from_numpy(random.standard_normal((150, 3)) * scales[:, None]).float()
    (result,) = quantize_group_on_device(
        [weight],
        plain_system(3),
        [widths(3, 2)],
        [counts(3, 0)],
        device,
        row_scales=[torch.from_numpy(scales)] if scaled else None,
        row_weights=[torch.from_numpy(prices)] if weighted else None,
    )
    ratio = weight.numpy() / scales[:, None]
    coded = result.dequantize().numpy() / scales[:, None]
    for column in range(3):
        distance = ratio[:, column].astype(np.float64) - coded[:, column]
        error = (prices * scales**2 * distance**2).sum()
        assert error < 1.01 * weighted_optimum(ratio[:, column], prices * scales**2, 4)


COLUMNS = 20
BITS = [widths(COLUMNS, 2), torch.tensor([2, 4, 3, 1] * 5, dtype=torch.uint8)]
RESERVED = [counts(COLUMNS, 0), torch.tensor([3, 0, 1, 40] * 5)]


def small_group(device: str, block_size: int = 128, asymmetric: float = 0.0):
    """Two linears of different heights, widths and reservations, solved together."""
    hessian = correlated_hessian(COLUMNS, seed=1)
    cross = 0.3 * gaussian(COLUMNS, COLUMNS, seed=17).double() @ hessian
    system = Gptq(block_size=block_size, asymmetric=asymmetric).prepare(Moments(hessian, cross))
    weights = [gaussian(64, COLUMNS, seed=2), gaussian(100, COLUMNS, seed=3)]
    return weights, system, quantize_group_on_device(weights, system, BITS, RESERVED, device)


@pytest.fixture(scope="module")
def group(device):
    return small_group(device)


@pytest.fixture(scope="module")
def asymmetric_group(device):
    return small_group(device, block_size=11, asymmetric=1.0)


@pytest.fixture(params=["group", "asymmetric_group"])
def either(request):
    return request.getfixturevalue(request.param)


def test_a_group_comes_out_as_from_the_cpu_loop(either):
    weights, system, results = either
    hessian = correlated_hessian(COLUMNS, seed=1)
    first = int(system.order[0])
    for weight, bits, reserved, result in zip(weights, BITS, RESERVED, results, strict=True):
        problem = LinearProblem(weight, hessian)
        expected = cpu_solution(problem, system, bits, reserved)
        error = describe(problem, system, result).output_error
        assert error == pytest.approx(expected.output_error, rel=0.06)
        expected = expected.quantized
        assert torch.equal(result.reserved.counts, reserved)
        assert reserved_rows(result, first) == reserved_rows(expected, first)
        assert result.ledger() == expected.ledger()
        again = unpack_weight(result.layout(), result.pack())
        assert torch.equal(again.dequantize(), result.dequantize())


def test_every_step_is_right_in_float64(either):
    """Replay: from the values that were chosen, each compensated column follows in float64."""
    weights, system, results = either
    order, factor = system.order.tolist(), system.inverse_factor.double().numpy()
    correction = system.correction
    made_up = np.zeros_like(factor) if correction is None else correction.double().numpy()
    for weight, reserved, result in zip(weights, RESERVED, results, strict=True):
        work = weight.double().numpy()[:, order].copy()
        original = work.copy()
        chosen = result.dequantize().double().numpy()[:, order]
        for position, column in enumerate(order):
            values = work[:, position]
            kept = reserved_rows(result, column)
            assert len(kept) == reserved[column]
            others = np.setdiff1d(np.arange(len(values)), kept)
            assert chosen[kept, position] == pytest.approx(values[kept], rel=1e-3, abs=1e-4)
            assert (result.codes[kept, column] == 0).all()
            if len(kept):
                assert np.abs(values[kept]).min() >= np.abs(values[others]).max() - 1e-4
            levels = level_values(result)[column][: 2 ** int(result.column_bits[column])]
            assert (np.diff(levels) >= 0).all()
            nearest = np.abs(values[others, None] - levels[None, :]).min(axis=1)
            distance = np.abs(values[others] - chosen[others, position])
            assert distance == pytest.approx(nearest, abs=1e-4)
            best = fit(values[others], len(levels))
            assert (distance**2).sum() <= 1.03 * squared_error(values[others], best) + 1e-6
            error = (values - chosen[:, position]) / factor[position, position]
            work[:, position + 1 :] -= np.outer(error, factor[position, position + 1 :])
            work += np.outer(original[:, position], made_up[position])


def test_a_block_size_changes_only_rounding(device, group):
    _, system, whole = group
    assert SUB_BLOCK < 11 < COLUMNS  # sub-blocks, a broken one, and a block border
    _, _, parts = small_group(device, block_size=11)
    for left, right in zip(whole, parts, strict=True):
        first = int(system.order[0])
        assert torch.equal(left.codes[:, first], right.codes[:, first])
        assert (left.codes == right.codes).float().mean() > 0.95
        assert left.dequantize().numpy() == pytest.approx(right.dequantize().numpy(), abs=0.2)


def test_the_same_problem_gives_the_same_answer(device):
    system = Gptq().prepare(Moments(correlated_hessian(4, seed=4)))
    first, second = (one(gaussian(70, 4, seed=5), system, 2, 2, device) for _ in range(2))
    for suffix, tensor in first.pack().items():
        assert torch.equal(tensor, second.pack()[suffix]), suffix


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_recorded_launches_give_the_same_answer(device):
    columns = 5 * SUB_BLOCK + 3
    system = Gptq(block_size=20).prepare(Moments(correlated_hessian(columns, seed=15)))
    problem = [gaussian(200, columns, seed=16)], system, [widths(columns, 2)], [counts(columns, 2)]
    (plain,) = quantize_group_on_device(*problem, device)
    (replayed,) = quantize_group_on_device(*problem, device, graph=True)
    for suffix, tensor in plain.pack().items():
        assert torch.equal(tensor, replayed.pack()[suffix]), suffix


def test_few_distinct_values_come_back_exactly(device):
    random = np.random.default_rng(6)
    values = np.float32([-3, 0.125, 0.1251220703125, 500])
    weight = torch.from_numpy(
        np.stack(
            [
                random.choice(values, 80),  # as many as levels, two of them close together
                random.choice(values[:3], 80),
                np.full(80, 0.75),
                np.zeros(80),
            ],
            axis=1,
        )
    ).float()
    assert torch.equal(one(weight, plain_system(4), 2, 0, device).dequantize(), weight)


def test_equal_weights_come_back_to_float16_precision(device):
    weight = torch.full((70, 3), 0.7)
    dequantized = one(weight, plain_system(3), 3, 5, device).dequantize()
    assert torch.equal(dequantized, weight.half().float())


def test_one_row_and_wholly_reserved_columns_are_kept_to_float16(device):
    row = gaussian(1, 3, seed=7)
    assert torch.equal(one(row, plain_system(3), 2, 0, device).dequantize(), row.half().float())
    weight = gaussian(10, 2, seed=8)
    result = one(weight, plain_system(2), 2, 10, device)
    assert torch.equal(result.dequantize(), weight.half().float())
    assert torch.equal(result.codes, torch.zeros(10, 2, dtype=torch.uint8))
    assert level_values(result).tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_ties_are_reserved_from_the_lower_row(device, count):
    weight = torch.tensor([[1.0], [-2.0], [2.0], [0.5], [3.0], [2.0], [-2.0], [0.0]])
    result = one(weight, plain_system(1), 1, count, device)
    expected = [4, 1, 2, 5, 6, 0, 3, 7][:count]
    assert reserved_rows(result, 0) == sorted(expected)


def test_a_dead_input_takes_no_error_and_gives_none(device):
    hessian = correlated_hessian(6, seed=9)
    hessian[2] = 0
    hessian[:, 2] = 0
    weight = gaussian(64, 6, seed=10)
    system = Gptq().prepare(Moments(hessian))
    whole = one(weight, system, 2, 0, device)
    alone = one(weight[:, 2:3], plain_system(1), 2, 0, device)
    assert torch.equal(whole.codes[:, 2:3], alone.codes)
    assert torch.equal(whole.dequantize()[:, 2:3], alone.dequantize())


def test_a_reserved_value_beyond_float16_is_refused_by_its_column(device):
    weight = gaussian(20, 3, seed=11)
    weight[4, 1] = 1e5
    with pytest.raises(NumericalError, match="column 1 has a weight of 1e"):
        one(weight, plain_system(3), 1, 1, device)


def test_weights_that_stop_being_numbers_are_refused(device):
    weight = gaussian(20, 3, seed=12)
    weight[4, 1] = float("nan")
    with pytest.raises(NumericalError, match="no longer finite"):
        one(weight, plain_system(3), 1, 1, device)


@pytest.mark.parametrize("solver", [Gptq(), Gptq(act_order=False), Nearest()])
def test_a_system_is_prepared_where_its_hessian_lies(device, solver):
    hessian = correlated_hessian(12, seed=14)
    expected = solver.prepare(Moments(hessian))
    with torch.device("meta"):  # a tensor made without naming the device would be made there
        system = solver.prepare(Moments(hessian.to(device)))
    assert system.order.tolist() == expected.order.tolist()
    for name in ("distortion_weight", "inverse_factor"):
        found, wanted = getattr(system, name), getattr(expected, name)
        if wanted is None:
            assert found is None
        else:
            assert found.device.type == device
            assert found.cpu().numpy() == pytest.approx(wanted.numpy(), rel=1e-5, abs=1e-7)


def test_without_triton_the_message_says_what_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "claq_exp.quantize.kernels.column_step", raising=False)
    monkeypatch.delattr("claq_exp.quantize.kernels.column_step", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="needs Triton, which is not installed"):
        one(gaussian(4, 2, seed=13), plain_system(2), 1, 0, "cpu")


def test_a_group_of_a_run_is_solved_by_the_kernel_where_it_knows_the_recipe(device):
    hessian = correlated_hessian(COLUMNS, seed=1)
    problems = [
        LinearProblem(gaussian(64, COLUMNS, seed=2), hessian, "first"),
        LinearProblem(gaussian(40, COLUMNS, seed=3), hessian, "second"),
    ]
    scaled = KMeans(row_scales=True)
    chosen = Recipe(scaled, Fixed(2), NoReservation(), Gptq())
    system = chosen.solver.prepare(Moments(hessian))
    plans = [decide(problem, system, chosen, None) for problem in problems]
    solved = chosen.solver.solve_together(problems, system, plans, torch.device(device))
    expected = [quantize_weight(problem, system, chosen) for problem in problems]
    for ours, theirs in zip(solved, expected, strict=True):
        assert ours.output_error == pytest.approx(theirs.output_error, rel=0.06)
        assert ours.quantized.layout() == theirs.quantized.layout()
    for unknown in (
        Recipe(KMeans(shared=True), Fixed(2), NoReservation(), Gptq()),
        Recipe(KMeans(), Fixed(6), NoReservation(), Gptq()),
        Recipe(Uniform(), Fixed(4), NoReservation(), Gptq()),
    ):
        plans = [decide(problem, system, unknown, None) for problem in problems]
        assert solve_on_device(problems, system, plans, torch.device(device)) is None
