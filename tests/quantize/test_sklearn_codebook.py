"""The codebooks of the reference code against scikit-learn called directly."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from quantize_references import random_problem, recipe, solve
from sklearn.cluster import KMeans as ReferenceKMeans

from claq_exp.errors import ConfigError
from claq_exp.quantize.codebook import KMeans, SklearnKMeans
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import Nearest


def reference_levels(values: np.ndarray, bits: int, seed: int = 10) -> list[float]:
    means = ReferenceKMeans(
        n_clusters=2**bits, random_state=seed, n_init=1, init="k-means++", max_iter=300, tol=1e-4
    ).fit(values.reshape(-1, 1))
    return np.sort(means.cluster_centers_.reshape(-1)).astype(np.float16).tolist()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 10])
@pytest.mark.parametrize("fit_reserved", [True, False])
def test_levels_are_those_of_scikit_learn(bits, seed, fit_reserved):
    weight, hessian = random_problem(rows=300, columns=3, seed=bits)
    chosen = recipe(
        codebook=SklearnKMeans(seed=seed, fit_reserved=fit_reserved),
        precision=Fixed(bits),
        reservation=FixedReservation(ratio=0.02),
        solver=Nearest(),
    )
    result = solve(weight, hessian, chosen).quantized
    for column in range(3):
        values = weight[:, column].numpy()
        kept = np.argsort(-np.abs(values), kind="stable")[:6]
        fitted = values if fit_reserved else np.delete(values, kept)
        assert result.values[column].tolist() == reference_levels(fitted, bits, seed)
        levels = result.values[column].float().numpy()
        nearest = np.abs(values[:, None] - levels[None, :]).argmin(axis=1)
        nearest[kept] = 0
        assert result.codes[:, column].tolist() == nearest.tolist()


@pytest.mark.case(31)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_columns_whose_passes_run_out_are_counted_and_keep_what_was_found(monkeypatch):
    weight, hessian = random_problem(rows=300, columns=3, seed=1)
    weight[:, 1] = torch.arange(300) % 4  # its levels need no passes
    chosen = recipe(codebook=SklearnKMeans(), precision=Fixed(3), solver=Nearest())
    assert solve(weight, hessian, chosen).unconverged == 0
    monkeypatch.setattr("claq_exp.quantize.codebook.sklearn_kmeans.PASSES", 1)
    solved = solve(weight, hessian, chosen)
    assert solved.unconverged == 2
    assert solved.weight_error < 0.2


@pytest.mark.parametrize("distinct", [1, 2, 5, 8])
def test_no_more_distinct_values_than_entries_are_the_levels_themselves(distinct):
    values = torch.arange(40) % distinct - 2.5
    chosen = recipe(codebook=SklearnKMeans(), solver=Nearest())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solved = solve(values[:, None], torch.eye(1, dtype=torch.float64), chosen)
    assert torch.equal(solved.quantized.dequantize()[:, 0], values)
    levels = solved.quantized.values[0].tolist()
    assert levels == sorted(levels)


def test_a_column_whose_entries_are_all_reserved_has_a_codebook_of_zeros():
    weight, hessian = random_problem(rows=20, columns=2, seed=0)
    chosen = recipe(
        codebook=SklearnKMeans(fit_reserved=False), reservation=FixedReservation(ratio=1.0)
    )
    result = solve(weight, hessian, chosen).quantized
    assert not result.values.any()


def test_the_codebook_of_the_package_is_closer_on_average():
    errors = {"own": 0.0, "reference": 0.0}
    for seed in range(5):
        weight, hessian = random_problem(rows=400, columns=8, seed=seed)
        for name, codebook in {"own": KMeans(), "reference": SklearnKMeans()}.items():
            chosen = recipe(codebook=codebook, precision=Fixed(4), solver=Nearest())
            errors[name] += solve(weight, hessian, chosen).weight_error
    assert errors["own"] < errors["reference"]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_an_impossible_seed_is_refused(seed):
    with pytest.raises(ConfigError, match=r"codebook\.seed"):
        SklearnKMeans(seed=seed)
