"""What every strategy of every family must do, and how a person adds one of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from own_solvers import CyclicDescent
from quantize_references import random_problem, recipe, solve

from claq_exp.allocate import RateDistortion
from claq_exp.errors import ConfigError, NumericalError
from claq_exp.payload import (
    BlockCodes,
    ColumnCodebooks,
    GroupTable,
    RowCodebooks,
    RowGrid,
    SignScales,
    unpack_weight,
)
from claq_exp.payload.base import Payload
from claq_exp.payload.column_codebooks import ColumnCodebooksLayout
from claq_exp.quantize.codebook import CODEBOOK, Codebook
from claq_exp.quantize.codebook.columns import PythonColumns
from claq_exp.quantize.moments import WANTED, Moments
from claq_exp.quantize.precision import PRECISION, Fixed, NoPrecision, Precision
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import planned_layout, quantize_weight
from claq_exp.quantize.reservation import RESERVATION, Reservation
from claq_exp.quantize.solver import SOLVER
from claq_exp.quantize.solver.column_loop import ColumnLoop
from claq_exp.quantize.solver.columns import ColumnSystem
from claq_exp.quantize.statistics import EqualColumns
from claq_exp.quantize.strategy import find_strategy

FAMILIES = {
    "codebook": CODEBOOK,
    "precision": {name: rule for name, rule in PRECISION.items() if name != "none"},
    "reservation": RESERVATION,
    "solver": SOLVER,
    "allocation": {"rate_distortion": RateDistortion},
}
MEMBERS = [(family, name) for family, members in FAMILIES.items() for name in members]
every_strategy = pytest.mark.parametrize(
    ("family", "name"), MEMBERS, ids=[f"{family}={name}" for family, name in MEMBERS]
)
SHAPES = [(1, 1), (1, 9), (9, 1), (2, 3), (49, 10), (70, 33)]
ALONE = {"codebooks": "own", "row_scales": "never", "reserve": False}
BUDGET = 9.0  # bits: what rate_distortion needs for so few rows, where codebooks cost most


def recipe_with(family: str, name: str):
    """The plain recipe, with one strategy as its own defaults make it."""
    strategy = FAMILIES[family][name]()
    if family == "codebook" and getattr(strategy, "bits", None):
        return recipe(codebook=strategy, precision=Fixed(strategy.bits))
    if family == "reservation" and strategy.thresholding:
        return recipe(reservation=strategy, solver=SOLVER["quantease"]())
    return recipe(**{family: strategy})


def refuses_few_rows(name: str, rows: int) -> bool:
    """Check that a budget which not even one-bit columns keep is refused."""
    if name == "rate_distortion" and rows < 9:
        with pytest.raises(ConfigError, match="bits per weight cannot be met"):
            quantize("allocation", name, *random_problem(rows, 5, seed=1))
        return True
    return False


def quantize(family: str, name: str, weight: torch.Tensor, hessian: torch.Tensor):
    if family == "allocation":
        return allocated(RateDistortion(BUDGET, **ALONE), weight, hessian)
    return solve(weight, hessian, recipe_with(family, name))


def allocated(rule: RateDistortion, weight: torch.Tensor, hessian: torch.Tensor):
    """Quantize a matrix that is all that there is of a model."""
    chosen, problem = recipe(precision=NoPrecision()), LinearProblem(weight, hessian)
    prepared = chosen.solver.prepare(Moments(hessian))
    statistics = prepared.statistics(problem)
    (plan,) = rule.plan_model({"": statistics}, chosen.codebook).values()
    return quantize_weight(problem, prepared, chosen, plan)


def assert_well_formed(result: Payload, rows: int, columns: int) -> None:
    assert result.codes.dtype == torch.uint8
    assert result.codes.shape == (rows, columns)
    assert result.column_bits.dtype == torch.uint8
    assert result.column_bits.shape == (columns,)
    assert (result.codes.int() < 2 ** result.column_bits.int()).all()
    assert result.reserved.counts.shape == (columns,)
    dequantized = result.dequantize()
    assert dequantized.dtype == torch.float32
    assert dequantized.shape == (rows, columns)
    assert torch.isfinite(dequantized).all()
    again = unpack_weight(result.layout(), result.pack())
    assert torch.equal(again.dequantize(), dequantized)


@pytest.mark.case(27)
@every_strategy
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_any_shape_gives_a_well_formed_matrix_that_packs_and_unpacks(family, name, rows, columns):
    if refuses_few_rows(name, rows):
        return
    solved = quantize(family, name, *random_problem(rows, columns, seed=1))
    assert_well_formed(solved.quantized, rows, columns)
    assert math.isfinite(solved.output_error)
    assert math.isfinite(solved.weight_error)


@every_strategy
def test_the_same_problem_gives_the_same_answer(family, name):
    first = quantize(family, name, *random_problem(40, 21, seed=2))
    second = quantize(family, name, *random_problem(40, 21, seed=2))
    for suffix, tensor in first.quantized.pack().items():
        assert torch.equal(tensor, second.quantized.pack()[suffix]), suffix
    assert first.output_error == second.output_error


@every_strategy
def test_weights_and_hessian_are_left_as_they_were(family, name):
    weight, hessian = random_problem(20, 9, seed=3)
    before = weight.clone(), hessian.clone()
    quantize(family, name, weight, hessian)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


@pytest.mark.case(27)
@every_strategy
@pytest.mark.parametrize("value", [0.0, 0.7, -1.3])
def test_equal_weights_come_back_to_float16_precision(family, name, value):
    _, hessian = random_problem(30, 8, seed=4)
    solved = quantize(family, name, torch.full((30, 8), value), hessian)
    assert_well_formed(solved.quantized, 30, 8)
    # codewords of block formats are fixed before, and a power of two hits no number as it is
    blocks = isinstance(solved.quantized, BlockCodes)
    assert solved.weight_error < (0.06 if blocks else 1e-5)
    assert solved.output_error < (0.06 if blocks else 1e-5)


@pytest.mark.case(27)
@every_strategy
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_constant_column_among_others_is_no_obstacle(family, name, value):
    weight, hessian = random_problem(30, 8, seed=5)
    weight[:, 3] = value
    solved = quantize(family, name, weight, hessian)
    assert_well_formed(solved.quantized, 30, 8)
    assert solved.output_error < (0.3 if name == "svid" else 0.2)  # of one bit


@pytest.mark.case(21)
@every_strategy
def test_dead_inputs_are_no_obstacle(family, name):
    weight, hessian = random_problem(30, 8, seed=6)
    hessian[5] = 0
    hessian[:, 5] = 0
    solved = quantize(family, name, weight, hessian)
    assert_well_formed(solved.quantized, 30, 8)
    assert solved.dead_columns == 1


@pytest.mark.case(25)
@every_strategy
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_is_refused_by_its_place(family, name, bad):
    weight, hessian = random_problem(30, 8, seed=7)
    weight[4, 6] = bad
    with pytest.raises(NumericalError, match=r"weight\[4, 6\]"):
        quantize(family, name, weight, hessian)


@every_strategy
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_bits_that_were_planned_are_the_bits_that_are_used(family, name, rows, columns):
    if refuses_few_rows(name, rows):
        return
    solved = quantize(family, name, *random_problem(rows, columns, seed=8))
    if name == "rate_distortion":  # its widths depend on the weights
        assert solved.quantized.ledger().total <= BUDGET * rows * columns
        return
    chosen = recipe_with(family, name)
    planned = planned_layout(chosen, rows, columns)
    if name == "iht":  # the most of a column may need fewer bits than at the start
        assert solved.quantized.ledger().total <= planned.ledger().total
        assert solved.quantized.layout().reserved == planned.reserved
        return
    assert solved.quantized.ledger() == planned.ledger()
    assert solved.quantized.layout().nominal_bits() == planned.nominal_bits()


@pytest.mark.case(39)
@every_strategy
def test_the_result_does_not_depend_on_threads(family, name):
    threads = torch.get_num_threads()
    weight, _ = random_problem(40, 21, seed=9)
    # what is factorized and summed here is exact, and no order of torch's changes it
    problem = weight, torch.diag(2.0 ** (torch.arange(21) * 5 % 21)).double()
    try:
        packed = []
        for count in (1, 2):
            torch.set_num_threads(count)
            packed.append(quantize(family, name, *problem).quantized.pack())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(packed[0][suffix], packed[1][suffix]) for suffix in packed[0])


@pytest.mark.parametrize("target_bits", [2.2, 2.6, 3.0, 4.0])
@pytest.mark.parametrize("count", ["linear", "nominal"])
def test_a_matrix_planned_by_itself_keeps_the_target_of_rate_distortion(target_bits, count):
    rule = RateDistortion(target_bits, count, **ALONE)
    result = allocated(rule, *random_problem(192, 40, seed=8)).quantized
    layout = result.layout()
    bits = layout.ledger().total / layout.weights if count == "linear" else layout.nominal_bits()
    assert target_bits - 0.05 < bits <= target_bits


@pytest.mark.parametrize("name", FAMILIES["precision"])
def test_widths_are_one_to_eight_bits_for_every_column(name):
    bits = PRECISION[name]().plan(EqualColumns(300, 64))
    assert bits.dtype == torch.uint8
    assert bits.shape == (64,)
    assert 1 <= int(bits.min()) <= int(bits.max()) <= 8


@pytest.mark.parametrize("name", RESERVATION)
def test_reserved_counts_fit_their_columns(name):
    for rows, columns in SHAPES:
        counts = RESERVATION[name]().plan(EqualColumns(rows, columns))
        assert counts.dtype == torch.int64
        assert counts.shape == (columns,)
        assert 0 <= int(counts.min()) <= int(counts.max()) <= rows


SOLVERS = {**SOLVER, "own": CyclicDescent}
every_solver = pytest.mark.parametrize("solver", [SOLVERS[name]() for name in SOLVERS], ids=SOLVERS)


@every_solver
def test_a_solver_visits_every_column_once(solver):
    _, hessian = random_problem(1, 12, seed=10)
    hessian[3] = 0
    hessian[:, 3] = 0
    prepared = solver.prepare(Moments(hessian))
    assert sorted(prepared.order.tolist()) == list(range(12))
    assert prepared.distortion_weight.dtype == torch.float32
    assert (prepared.distortion_weight[~prepared.dead] > 0).all()
    assert prepared.dead.tolist() == [column == 3 for column in range(12)]
    assert prepared.added.dtype == torch.float64
    assert prepared.added.shape == (12,)
    assert (prepared.damping is None) == (not prepared.added.any())


@every_solver
def test_a_solver_wants_what_there_is(solver):
    assert isinstance(solver.wants, frozenset)
    assert solver.wants <= set(WANTED)


@every_solver
@pytest.mark.parametrize("disposable", [True, False])
def test_a_solver_keeps_moments_as_they_are_or_says_that_it_has_used_them_up(solver, disposable):
    weight, hessian = random_problem(20, 9, seed=13)
    expected = solve(weight, hessian, recipe(solver=solver))
    own = hessian.clone()
    moments = Moments(own, tokens=72, disposable=disposable)
    problem = LinearProblem(weight, hessian)
    prepared = solver.prepare(moments)
    assert moments.tokens == 72
    if not moments.used_up:
        assert torch.equal(own, hessian)
    else:
        assert disposable
        problem = LinearProblem(weight, None, known_energy=problem.energy())
    found = quantize_weight(problem, prepared, recipe(solver=solver))
    assert torch.equal(found.quantized.codes, expected.quantized.codes)
    assert found.output_error == expected.output_error


@every_solver
def test_a_solver_takes_the_mean_of_groups_or_says_that_it_takes_each(solver):
    assert not solver.wants
    problems = [random_problem(20, 9, seed=seed) for seed in (14, 15, 16)]
    groups = torch.stack([hessian for _, hessian in problems])
    weight, mean = problems[0][0], groups.mean(dim=0)
    expected = solve(weight, mean, recipe(solver=solver))
    for disposable in (False, True):
        moments = Moments(groups.clone(), disposable=disposable)
        prepared = solver.prepare(moments)
        found = quantize_weight(LinearProblem(weight, mean), prepared, recipe(solver=solver))
        same = torch.equal(found.quantized.codes, expected.quantized.codes)
        assert same or solver.row_groups
        assert moments.used_up or torch.equal(moments.hessian, groups)


@every_solver
def test_the_weight_may_be_solved_again_and_again_from_one_preparation(solver):
    weight, hessian = random_problem(20, 9, seed=17)
    prepared, problem = solver.prepare(Moments(hessian)), LinearProblem(weight, hessian)
    first, second = (quantize_weight(problem, prepared, recipe(solver=solver)) for _ in range(2))
    assert torch.equal(first.quantized.codes, second.quantized.codes)
    assert first.output_error == second.output_error


WIDTHS = {
    "bfp": (2, 3, 8),
    "vsq": (2, 3, 8),
    "mxfp4": (),
    "nvfp4": (),
    "lo_bcq": (2, 3),
    "svid": (1,),
}


@pytest.mark.parametrize("name", CODEBOOK)
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_a_codebook_uses_no_more_values_than_its_codes_name(name, bits):
    if bits not in WIDTHS.get(name, (1, 2, 3, 8)):
        return
    chosen = recipe(codebook=CODEBOOK[name](), precision=Fixed(bits), solver=SOLVER["nearest"]())
    weight, hessian = random_problem(300, 2, seed=11)
    result = solve(weight, hessian, chosen).quantized
    assert int(result.codes.max()) <= 2**bits - 1
    if isinstance(result, ColumnCodebooks):
        assert result.values.shape == (2, 2**bits)
    if isinstance(result, RowCodebooks):
        assert all(len(row.unique()) <= 2**bits for row in result.dequantize())
    elif not isinstance(result, RowGrid | BlockCodes | GroupTable | SignScales):
        assert all(len(column.unique()) <= 2**bits for column in result.dequantize().t())


@dataclass(frozen=True)
class EveryThird(Precision):
    """A person's own precision."""

    bits: int = 2

    def plan(self, statistics):
        bits = torch.full((statistics.shape[1],), self.bits, dtype=torch.uint8)
        bits[::3] = self.bits + 1
        return bits


@dataclass(frozen=True)
class FirstColumn(Reservation):
    """A person's own reservation."""

    def plan(self, statistics):
        counts = torch.zeros(statistics.shape[1], dtype=torch.int64)
        counts[0] = statistics.shape[0]
        return counts


@dataclass(frozen=True)
class Powers(Codebook):
    """A person's own codebook: signed powers of two, the same for every column."""

    mixed_widths: ClassVar[bool] = True
    reserves: ClassVar[bool] = True

    def layout(self, rows, plan):
        return ColumnCodebooksLayout.of(rows, plan.column_bits, plan.reserved_counts)

    def start(self, statistics, plan):
        return PowerColumns(statistics, plan)


class PowerColumns(PythonColumns):
    def __init__(self, statistics, plan):
        super().__init__(statistics, plan)
        entries = 2 ** plan.column_bits.numpy().astype(int)
        self.values = np.zeros((len(entries), entries.max()), dtype=np.float16)
        for column, count in enumerate(entries):
            half = 2.0 ** -np.arange(count // 2)
            self.values[column, :count] = np.concatenate([-half, half[::-1]])
        self.entries = entries

    def quantize(self, column, values, reserved):
        levels = self.values[column, : self.entries[column]].astype(np.float32)
        codes = np.abs(values[:, None] - levels[None, :]).argmin(axis=1)
        return codes.astype(np.uint8), levels[codes]

    def payload(self):
        return ColumnCodebooks(*self.coded(), torch.from_numpy(self.values))


@dataclass(frozen=True)
class Backwards(ColumnLoop):
    """A person's own solver: from the last column to the first, uncompensated."""

    def prepare(self, moments):
        count = moments.hessian.shape[-1]
        return ColumnSystem(
            order=torch.arange(count - 1, -1, -1),
            inverse_factor=None,
            distortion_weight=torch.ones(count),
            damping=None,
            added=torch.zeros(count, dtype=torch.float64),
            dead=torch.zeros(count, dtype=torch.bool),
            block_size=4,
        )


@dataclass(frozen=True)
class Constant(Precision, Reservation):
    """A plan that answers the same whatever it is asked."""

    answer: torch.Tensor

    def plan(self, statistics):
        return self.answer.expand(statistics.shape[1])


BAD_WIDTHS = [torch.tensor([9], dtype=torch.uint8), torch.tensor([0], dtype=torch.uint8)]
BAD_COUNTS = [torch.tensor([-1]), torch.tensor([1000]), torch.tensor([1], dtype=torch.int32)]


@pytest.mark.parametrize(
    "changes",
    [{"precision": Constant(answer)} for answer in [*BAD_WIDTHS, torch.tensor([4])]]
    + [{"reservation": Constant(answer)} for answer in BAD_COUNTS],
)
def test_a_plan_of_ones_own_that_is_no_plan_is_refused_by_its_class(changes):
    with pytest.raises(ConfigError, match=r"Constant\.plan gave"):
        recipe(**changes)


def test_strategies_of_ones_own_work_together_by_dotted_path():
    own = {
        family: find_strategy(family, FAMILIES[family], f"{__name__}:{class_name}")()
        for family, class_name in {
            "codebook": "Powers",
            "precision": "EveryThird",
            "reservation": "FirstColumn",
            "solver": "Backwards",
        }.items()
    }
    weight, hessian = random_problem(20, 10, seed=12)
    result = solve(weight, hessian, recipe(**own)).quantized
    assert_well_formed(result, 20, 10)
    assert result.column_bits.tolist() == [3, 2, 2, 3, 2, 2, 3, 2, 2, 3]
    assert torch.equal(result.dequantize()[:, 0], weight[:, 0].half().float())
    assert set(result.dequantize()[:, 1].tolist()) <= {-1.0, -0.5, 0.5, 1.0}
    assert planned_layout(recipe(**own), 20, 10).ledger() == result.ledger()


class PlanAlone:
    """A person's own precision that inherits from nothing."""

    def plan(self, statistics):
        return torch.full((statistics.shape[1],), 2, dtype=torch.uint8)


def test_a_strategy_without_what_its_family_asks_is_refused_with_the_class_to_inherit_from():
    with pytest.raises(ConfigError) as caught:
        recipe(precision=PlanAlone())
    told = str(caught.value)
    assert f"precision.name={__name__}:PlanAlone has no plan_key, check_names, ranges;" in told
    assert "inherit from claq_exp.quantize.precision.base.Precision" in told


def test_a_solver_that_wants_what_nobody_measures_is_refused_with_what_there_is():
    class Greedy(Backwards):
        wants = frozenset({"cross", "fame"})

    with pytest.raises(ConfigError, match=r"wants 'fame'.*cross, output_gradients"):
        recipe(solver=Greedy())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_name_is_refused_with_the_known_ones(family):
    with pytest.raises(ConfigError) as caught:
        find_strategy(family, FAMILIES[family], "galaxy")
    assert f"{family}.name 'galaxy'" in str(caught.value)
    assert all(name in str(caught.value) for name in FAMILIES[family])
    assert "package.module:Class" in str(caught.value)


@pytest.mark.parametrize(
    "path",
    ["no_such_module_at_all:Thing", f"{__name__}:Missing", f"{__name__}:FAMILIES", ":X", "math:"],
)
def test_a_path_that_leads_nowhere_is_refused(path):
    with pytest.raises(ConfigError, match=r"precision\.name"):
        find_strategy("precision", PRECISION, path)


def test_a_short_name_is_a_member_of_its_family():
    assert find_strategy("precision", PRECISION, "fixed") is Fixed


def test_a_hessian_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="3 columns"):
        LinearProblem(torch.ones(2, 3), torch.eye(4, dtype=torch.float64))
