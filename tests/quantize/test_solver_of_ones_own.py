"""A solver that is no column loop, by itself and through a whole run."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from own_solvers import CyclicDescent
from quantize_references import random_problem, recipe, solve

from claq_exp.cli import main
from claq_exp.payload import unpack_weight
from claq_exp.quantize.codebook import CODEBOOK, KMeans, Uniform
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import Nearest
from claq_exp.run.solve import solve_linears

GRID = {"codebook": Uniform(), "precision": Fixed(2)}


def descended(weight: np.ndarray, hessian: np.ndarray, start: np.ndarray, levels: list[float]):
    """One sweep in float64: every level of every entry is tried, the loss summed in full."""
    found = start.copy()
    for column, row in itertools.product(range(weight.shape[1]), range(len(weight))):
        missed = found[row] - weight[row]

        def loss(level, missed=missed, row=row, column=column):
            missed[column] = level - weight[row, column]
            return missed @ hessian @ missed

        found[row, column] = min(levels[row], key=loss)
    return found


@pytest.mark.parametrize("sweeps", [1, 2, 4])
def test_coordinate_descent_takes_the_level_that_a_full_search_takes(sweeps):
    weight, hessian = random_problem(rows=6, columns=7, seed=sweeps)
    nearest = solve(weight, hessian, recipe(**GRID, solver=Nearest())).quantized
    levels = [
        [float(scale) * (code - float(zero)) for code in range(4)]
        for scale, zero in zip(nearest.scales[:, 0], nearest.zeros[:, 0], strict=True)
    ]
    expected = nearest.dequantize().double().numpy()
    for _ in range(sweeps):
        expected = descended(weight.double().numpy(), hessian.numpy(), expected, levels)
    solved = solve(weight, hessian, recipe(**GRID, solver=CyclicDescent(sweeps)))
    assert np.array_equal(solved.quantized.dequantize().double().numpy(), expected)


@pytest.mark.parametrize(
    "codebook", [Uniform(4), CODEBOOK["nvfp4"](), CODEBOOK["lo_bcq"]()], ids=str
)
def test_on_levels_that_are_fixed_no_sweep_raises_the_error(codebook):
    bits = 4 if codebook == CODEBOOK["nvfp4"]() else 3
    problem = random_problem(rows=30, columns=20, seed=3)
    chosen = {"codebook": codebook, "precision": Fixed(bits)}
    errors = [solve(*problem, recipe(**chosen, solver=Nearest())).output_error]
    for sweeps in range(4):
        solver = CyclicDescent(sweeps)
        errors.append(solve(*problem, recipe(**chosen, solver=solver)).output_error)
    assert errors[0] == errors[1]
    assert all(after <= before + 1e-7 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize("name", CODEBOOK)
def test_it_works_with_every_codebook_and_packs(name):
    codebook = CODEBOOK[name]()
    weight, hessian = random_problem(rows=30, columns=9, seed=4)
    hessian[2] = 0
    hessian[:, 2] = 0
    bits = {"mxfp4": 4, "nvfp4": 4, "svid": 1}.get(name, 2)
    changes = {"reservation": FixedReservation(0.1)} if codebook.reserves else {}
    chosen = recipe(codebook=codebook, precision=Fixed(bits), solver=CyclicDescent(), **changes)
    solved = solve(weight, hessian, chosen)
    assert solved.dead_columns == 1
    assert math.isfinite(solved.output_error)
    packed = solved.quantized.pack()
    dense = solved.quantized.dequantize()
    assert torch.equal(unpack_weight(solved.quantized.layout(), packed).dequantize(), dense)
    again = solve(weight, hessian, chosen).quantized.pack()
    assert all(torch.equal(packed[suffix], again[suffix]) for suffix in packed)


def test_a_device_leaves_it_to_the_cpu(pretend):
    weight, hessian = random_problem(rows=12, columns=8, seed=5)
    chosen = recipe(codebook=KMeans(), solver=CyclicDescent())
    on = [torch.device("cpu"), torch.device(pretend)]
    (one, _), (other, _) = (
        solve_linears({"layer": weight}, Moments(hessian), chosen, device=place)[0] for place in on
    )
    assert torch.equal(one.quantized.codes, other.quantized.codes)
    assert one.output_error == pytest.approx(other.output_error)
    assert not other.retreats


def test_a_whole_run_takes_it_by_its_dotted_name(tiny_run, tmp_path):
    words = [
        *tiny_run,
        *("codebook=uniform", "precision=fixed", "precision.bits=3", "reservation=none"),
        *("embedding=none", "threads=1"),
    ]
    own = ["solver=nearest", "solver.name=own_solvers:CyclicDescent", "+solver.sweeps=3"]
    errors = {}
    for name, more in {"nearest": ["solver=nearest"], "own": own}.items():
        assert main([*words, *more, f"name={name}"]) == 0
        (folder,) = Path(tmp_path, "outputs", name).iterdir()
        with (folder / "layers.csv").open(encoding="utf-8") as file:
            errors[name] = [float(row["output_error"]) for row in csv.DictReader(file)]
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        assert math.isfinite(results["perplexity"]["wikipedia"]["quantized"])
    assert len(errors["own"]) == 21
    assert sum(errors["own"]) < 0.8 * sum(errors["nearest"])


def test_a_solver_that_wants_what_the_objective_does_not_measure_is_refused(tiny_run, capfd):
    words = ["solver=nearest", "solver.name=own_solvers:Weighted"]
    assert main(["plan", *tiny_run, *words]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "solver Weighted wants output gradients" in line
    assert "objective=output_gradient" in line
    assert main(["plan", *tiny_run, *words, "objective=output_gradient"]) == 0


def test_a_solver_that_wants_the_cross_moment_gets_it(tiny_run):
    words = ["codebook=uniform", "precision=fixed", "precision.bits=3", "reservation=none"]
    own = ["solver=nearest", "solver.name=own_solvers:Asymmetric", "+solver.sweeps=1"]
    assert main([*tiny_run, *words, *own, "threads=1"]) == 0
