"""The linears that share an input, solved with a Hessian that is used up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from claq_exp.calibration.moments import MomentsAccumulator
from claq_exp.errors import NumericalError
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, quantize_weight
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Gptq, Nearest
from claq_exp.run.solve import report_row, solve_linears
from claq_exp.run_folder.fallbacks import count_fallbacks

MIB = 2**20


def recipe(solver: object) -> Recipe:
    return Recipe(KMeans(), Fixed(2), NoReservation(), solver)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    accumulator = MomentsAccumulator(columns)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    accumulator.add(inputs * torch.linspace(0.1, 3, columns), where="here")
    return torch.randn(rows, columns, generator=generator), accumulator.moments().single()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that share a sum add it up in an order of their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.case(37)
@pytest.mark.parametrize("solver", [Gptq(), Gptq(act_order=False), Nearest()], ids=str)
def test_a_group_is_solved_as_its_matrices_alone(solver, one_thread):
    weight, hessian = problem(rows=20, columns=70)
    weights = {"first": weight, "second": weight.flip(0)[:7].contiguous()}
    alone = [
        quantize_weight(
            LinearProblem(each, hessian), solver.prepare(Moments(hessian)), recipe(solver)
        )
        for each in weights.values()
    ]
    together = solve_linears(weights, Moments(hessian), recipe(solver))
    for expected, (found, seconds) in zip(alone, together, strict=True):
        assert seconds > 0
        assert torch.equal(found.quantized.codes, expected.quantized.codes)
        assert found.output_error == expected.output_error
        assert found.weight_error == expected.weight_error


def test_the_hessian_is_given_back_before_the_column_loop():
    weight, hessian = problem(rows=5, columns=30)
    moments = Moments(hessian, disposable=True)

    class Watched(Gptq):
        def solve(self, problem, prepared, plan):
            assert moments.used_up
            assert problem.hessian is None
            return super().solve(problem, prepared, plan)

    assert solve_linears({"layer": weight}, moments, recipe(Watched()))


def test_moments_that_are_not_disposable_stay_as_they_are():
    weight, hessian = problem(rows=5, columns=30)
    moments = Moments(hessian)
    ((found, _),) = solve_linears({"layer": weight}, moments, recipe(Gptq()))
    assert torch.equal(moments.single(), problem(rows=5, columns=30)[1])
    given = Moments(hessian.clone(), disposable=True)
    ((again, _),) = solve_linears({"layer": weight}, given, recipe(Gptq()))
    assert given.used_up
    assert torch.equal(found.quantized.codes, again.quantized.codes)
    assert found.output_error == again.output_error


def test_a_solution_of_a_problem_whose_hessian_is_gone_needs_its_energy():
    with pytest.raises(ValueError, match="needs the energy"):
        LinearProblem(torch.ones(2, 3), None)
    left = LinearProblem(torch.ones(2, 3), None, known_energy=2.0)
    assert left.energy() == 2.0
    with pytest.raises(ValueError, match="gone"):
        left.error(left.weight)


@pytest.mark.case(25)
def test_a_weight_that_is_no_number_is_named_with_its_place():
    weight, hessian = problem(rows=90, columns=12)
    broken = weight.clone()
    broken[77, 3] = torch.nan
    weights = {"model.q_proj": weight, "model.k_proj": broken}
    with pytest.raises(NumericalError, match=r"model\.k_proj: weight\[77, 3\] is nan"):
        solve_linears(weights, Moments(hessian), recipe(Gptq()))


def indefinite(columns: int) -> torch.Tensor:
    """A Hessian with an eigenvalue that no damping reaches."""
    hessian = problem(1, columns)[1]
    hessian[2, 2] = -2 * hessian.diagonal().sum()
    return hessian


@pytest.mark.case(23)
def test_a_hessian_that_no_damping_mends_has_its_layers_rounded_to_nearest_and_told():
    weight, _ = problem(rows=20, columns=30)
    ((found, _),) = solve_linears({"model.o_proj": weight}, Moments(indefinite(30)), recipe(Gptq()))
    ((rounded, _),) = solve_linears(
        {"model.o_proj": weight}, Moments(indefinite(30)), recipe(Nearest())
    )
    assert torch.equal(found.quantized.dequantize(), rounded.quantized.dequantize())
    row = report_row(0, "model.o_proj", found, 100, 0.1)
    assert (row["nearest"], row["damping"]) == ("indefinite", None)
    assert count_fallbacks([row])["layers_indefinite"] == 1


@pytest.mark.case(23)
def test_strict_refuses_it_with_the_layer_and_the_smallest_eigenvalue():
    weight, _ = problem(rows=20, columns=30)
    with pytest.raises(NumericalError, match=r"model\.o_proj: .*smallest eigenvalue -\d"):
        solve_linears(
            {"model.o_proj": weight}, Moments(indefinite(30)), recipe(Gptq()), strict=True
        )


class Short(Gptq):
    """A solver without memory for anything but the CPU."""

    def prepare(self, moments):
        if moments.hessian.device.type != "cpu":
            raise torch.OutOfMemoryError("no room")
        return super().prepare(moments)


class Narrow(Gptq):
    """A solver whose columns find no memory."""

    def solve_together(self, problems, prepared, plans, device):
        raise torch.OutOfMemoryError("no room")


@pytest.mark.case(101)
@pytest.mark.parametrize("solver", [Short(), Narrow()], ids=["factor", "columns"])
def test_a_device_without_memory_hands_over_to_the_cpu_and_that_is_told(solver):
    weight, hessian = problem(rows=20, columns=30)
    ((expected, _),) = solve_linears({"layer": weight}, Moments(hessian), recipe(Gptq()))
    # neither is the device "cpu", and the second can hold numbers
    device = torch.device("meta") if isinstance(solver, Short) else torch.device("cpu", 0)
    ((found, _),) = solve_linears(
        {"layer": weight}, Moments(hessian), recipe(solver), device=device
    )
    assert torch.equal(found.quantized.codes, expected.quantized.codes)
    assert report_row(0, "layer", found, 100, 0.1)["retreats"] == 1
    assert report_row(0, "layer", expected, 100, 0.1)["retreats"] is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters")
def test_a_solve_takes_one_float64_and_one_float32_matrix():
    columns, rows = 2048, 64
    weight, hessian = problem(rows, 128)
    solve_linears(
        {"layer": weight}, Moments(hessian), recipe(Gptq())
    )  # compiles and loads libraries
    inputs = torch.randn(256, columns, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    accumulator = MomentsAccumulator(columns)
    accumulator.add(inputs, where="here")
    solve_linears({"layer": weight}, accumulator.moments(), recipe(Gptq()))
    square = columns**2
    assert resident("VmHWM") - before < 12 * square + 32 * MIB


def resident(field: str) -> int:
    """Resident bytes of this process: now (VmRSS), or the most since the counter was reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])
