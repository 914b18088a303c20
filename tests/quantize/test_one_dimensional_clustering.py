"""Column fits against brute force and two independent libraries; assign_codes against argmin."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import kmeans1d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import best_error, fitted, squared_error
from safetensors import safe_open
from sklearn.cluster import KMeans as ReferenceKMeans
from threadpoolctl import threadpool_limits

from claq_exp.quantize.codebook.basics import assign_codes
from claq_exp.quantize.codebook.clustering import fit_levels
from claq_exp.quantize.codebook.exact import fit_levels_exact, fit_quantiles

QUICK = settings(max_examples=80)
REAL_MODEL = Path(__file__).parents[2].parent / "shared/models/stories15M/model.safetensors"


def with_outliers(generator: np.random.Generator, count: int) -> np.ndarray:
    values = generator.normal(size=count)
    values[:4] = generator.uniform(15, 60, 4) * generator.choice([-1.0, 1.0], 4)
    return values


COLUMNS = {
    "normal": lambda generator, count: generator.normal(size=count),
    "student_t5": lambda generator, count: generator.standard_t(5, size=count),
    "student_t3": lambda generator, count: generator.standard_t(3, size=count),
    "laplace": lambda generator, count: generator.laplace(size=count),
    "integers": lambda generator, count: generator.integers(-20, 20, count) * 0.5,
    "outliers": with_outliers,
}
SMOOTH = ["normal", "student_t5", "student_t3", "laplace", "outliers"]


def column(kind: str, generator: np.random.Generator, count: int) -> np.ndarray:
    return COLUMNS[kind](generator, count).astype(np.float32)


finite = st.floats(-1e6, 1e6, width=32)
column_values = st.lists(finite, min_size=1, max_size=60).map(
    lambda values: np.array(values, dtype=np.float32)
)
entry_counts = st.sampled_from([2, 4, 8, 16])
all_fits = pytest.mark.parametrize("fit", [fit_levels, fit_levels_exact, fit_quantiles])
least_squares = pytest.mark.parametrize("fit", [fit_levels, fit_levels_exact])


def optimum(values: np.ndarray, entries: int) -> float:
    """The least squared error there is, by kmeans1d's dynamic program."""
    centroids = kmeans1d.cluster(values.astype(float).tolist(), entries).centroids
    return squared_error(values, np.array(centroids))


def excess(values: np.ndarray, entries: int) -> float:
    found, best = (
        squared_error(values, fitted(fit_levels, values, entries)),
        optimum(values, entries),
    )
    assert found >= best * (1 - 1e-9)
    return found / best - 1


@pytest.mark.case(32)
@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("rows", [192, 288, 576, 768, 1536])
@pytest.mark.parametrize("entries", [4, 8, 16])
def test_long_columns_come_close_to_the_global_optimum_of_kmeans1d(kind, rows, entries):
    generator = np.random.default_rng([entries, rows])
    found = [excess(column(kind, generator, rows), entries) for _ in range(20)]
    # of 16 cells several go to single outliers, two of which may share a bin far outside
    heavy = kind in ("student_t3", "outliers") and entries == 16
    assert np.mean(found) < (0.01 if heavy else 0.005)


@pytest.mark.skipif(not REAL_MODEL.is_file(), reason="needs the model stories15M")
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_columns_of_a_real_model_come_close_to_the_optimum_too(name):
    with safe_open(REAL_MODEL, framework="np") as file:
        weight = file.get_tensor(f"model.layers.2.{name}.weight").astype(np.float32)
    columns = weight.T[:: weight.shape[1] // 12]
    for entries in (4, 8, 16):
        assert np.mean([excess(np.ascontiguousarray(c), entries) for c in columns]) < 0.005


@pytest.mark.parametrize("kind", ["normal", "student_t3", "integers"])
@least_squares
def test_small_columns_get_the_best_of_all_partitions(fit, kind):
    generator = np.random.default_rng(1)
    for _ in range(60):
        entries = int(generator.choice([2, 3, 4, 5, 8]))
        values = column(kind, generator, int(generator.integers(2, 13)))
        found = squared_error(values, fitted(fit, values, entries))
        best = best_error(values, entries)
        assert found == pytest.approx(best, rel=1e-6, abs=1e-9)


@pytest.mark.case(32)
@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize(("rows", "entries"), [(40, 2), (301, 4), (500, 16), (700, 7), (300, 64)])
def test_the_exact_fit_is_the_global_optimum_of_kmeans1d(kind, rows, entries):
    values = column(kind, np.random.default_rng([rows, entries]), rows)
    found = squared_error(values, fitted(fit_levels_exact, values, entries))
    assert found == pytest.approx(optimum(values, entries), rel=1e-9)


@pytest.mark.parametrize("kind", ["normal", "student_t3", "integers"])
@least_squares
def test_weighted_columns_get_the_best_of_all_partitions(fit, kind):
    generator = np.random.default_rng(2)
    for _ in range(40):
        entries = int(generator.choice([2, 3, 4]))
        values = column(kind, generator, int(generator.integers(3, 12)))
        weights = generator.exponential(size=len(values)).astype(np.float32)
        weights[generator.random(len(values)) < 0.2] = 0
        found = squared_error(values, fitted(fit, values, entries, weights), weights)
        assert found == pytest.approx(best_error(values, entries, weights), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("entries", [4, 8, 16])
def test_a_whole_weight_counts_as_so_many_values(kind, entries):
    generator = np.random.default_rng(3)
    found, exact = [], []
    for _ in range(6):
        values = column(kind, generator, 300)
        weights = generator.integers(0, 6, 300)
        repeated = np.repeat(values, weights)
        best = optimum(repeated, entries)
        single = weights.astype(np.float32)
        found.append(squared_error(repeated, fitted(fit_levels, values, entries, single)) / best)
        exact.append(
            squared_error(repeated, fitted(fit_levels_exact, values, entries, single)) / best
        )
    assert exact == pytest.approx([1.0] * 6, rel=1e-9)
    assert 1 - 1e-9 <= np.mean(found) < (1.02 if kind == "outliers" and entries == 16 else 1.005)


@pytest.mark.parametrize("kind", ["normal", "student_t3", "outliers"])
@pytest.mark.parametrize("entries", [4, 16])
def test_weighted_levels_are_no_worse_than_those_of_scikit_learn(kind, entries):
    generator = np.random.default_rng(10 + entries)
    ratios = []
    for seed in range(6):
        values = column(kind, generator, 576)
        weights = generator.exponential(size=576).astype(np.float32)
        with threadpool_limits(1):  # threads cost more than they give on so few values
            reference = ReferenceKMeans(entries, n_init=2, random_state=seed)
            reference.fit(values[:, None], sample_weight=weights)
        theirs = squared_error(values, reference.cluster_centers_[:, 0], weights)
        mine = squared_error(values, fitted(fit_levels, values, entries, weights), weights)
        ratios.append(mine / theirs)
    assert np.mean(ratios) <= 1.0


@pytest.mark.parametrize("size", [30.0, 1e3, 1e6])
@pytest.mark.parametrize("entries", [4, 8, 16])
def test_a_value_without_weight_does_not_matter_however_large(entries, size):
    values = column("normal", np.random.default_rng(4), 768)
    best = optimum(values, entries)
    whole = np.append(values, np.float32(size))
    weights = np.append(np.ones(768), 0).astype(np.float32)
    assert squared_error(values, fitted(fit_levels, whole, entries, weights)) <= 1.01 * best
    exact = fitted(fit_levels_exact, whole, entries, weights)
    assert squared_error(values, exact) == pytest.approx(best, rel=1e-9)


@all_fits
@QUICK
@given(values=column_values, entries=entry_counts)
def test_levels_are_ascending_finite_inside_the_column_and_the_same_every_time(
    fit, values, entries
):
    levels = fitted(fit, values, entries)
    assert np.isfinite(levels).all()
    assert (np.diff(levels) >= -1e-9 * np.abs(values).max()).all()
    assert np.array_equal(levels, fitted(fit, values.copy(), entries))
    slack = 1e-6 * np.abs(values).max()
    assert levels[0] >= values.min() - slack
    assert levels[-1] <= values.max() + slack


@all_fits
@QUICK
@given(values=column_values, entries=entry_counts)
def test_more_than_one_level_never_costs_more_than_the_mean_alone(fit, values, entries):
    mean = squared_error(values, [values.astype(np.float64).mean()])
    found = squared_error(values, fitted(fit, values, entries))
    assert found <= mean * (1 + 1e-6) + 1e-9


@pytest.mark.case(27)
@least_squares
@QUICK
@given(
    distinct=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=16, unique=True),
    repeats=st.integers(1, 5),
)
def test_no_more_distinct_values_than_entries_gives_zero_error(fit, distinct, repeats):
    values = np.repeat(np.array(distinct, dtype=np.float32), repeats)
    levels = fitted(fit, values, 16)
    assert squared_error(values, levels) <= 1e-20 * float(np.square(values, dtype=float).sum())


@pytest.mark.case(27)
@all_fits
def test_a_constant_column_gets_its_value_as_every_level(fit):
    levels = fitted(fit, np.full(37, -0.375, dtype=np.float32), 8)
    assert levels.tolist() == [-0.375] * 8


@all_fits
def test_a_column_without_weight_gets_zeros(fit):
    values = np.arange(5, dtype=np.float32)
    assert fitted(fit, values, 4, np.zeros(5, dtype=np.float32)).tolist() == [0.0] * 4


@all_fits
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_no_number_leads_to_no_crash(fit, bad):
    values = column("normal", np.random.default_rng(6), 300)
    values[7] = bad
    assert fitted(fit, values, 8).shape == (8,)


@pytest.mark.case(28)
@pytest.mark.parametrize("entries", [4, 8, 16])
def test_one_huge_outlier_gets_a_level_of_its_own_and_leaves_the_rest_well_covered(entries):
    rest = column("normal", np.random.default_rng(3), 300)
    levels = fitted(fit_levels, np.append(rest, np.float32(1e6)), entries)
    assert levels[-1] == pytest.approx(1e6, rel=1e-12)
    assert squared_error(rest, levels[:-1]) <= 1.005 * optimum(rest, entries - 1)


def test_repeated_values_weigh_as_often_as_they_occur():
    values = np.array([0.0] * 90 + [1.0] * 10 + [5.0], dtype=np.float32)
    assert fitted(fit_levels, values, 2) == pytest.approx([0.1, 5.0])


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("entries", [4, 16])
@pytest.mark.parametrize(("scale", "shift"), [(2.0**-20, 0.0), (-3.7, 0.0), (1e3, 0.0), (1.0, 5.0)])
def test_the_error_scales_and_shifts_with_the_column(kind, entries, scale, shift):
    values = column(kind, np.random.default_rng(5), 400)
    moved = (values.astype(np.float64) * scale + shift).astype(np.float32)
    exact = squared_error(values, fitted(fit_levels_exact, values, entries)) * scale**2
    again = squared_error(moved, fitted(fit_levels_exact, moved, entries))
    assert again == pytest.approx(exact, rel=1e-4)
    assert squared_error(moved, fitted(fit_levels, moved, entries)) < 1.03 * exact


@least_squares
@pytest.mark.parametrize("factor", [2.0**-40, 3.0, 1e6])
def test_weights_count_relative_to_each_other(fit, factor):
    generator = np.random.default_rng(7)
    values = column("student_t5", generator, 500)
    weights = generator.exponential(size=500).astype(np.float32)
    levels = fitted(fit, values, 8, weights)
    scaled = fitted(fit, values, 8, (weights * factor).astype(np.float32))
    assert scaled == pytest.approx(levels, rel=1e-5)


@all_fits
def test_weights_of_any_size_lead_to_no_crash(fit):
    generator = np.random.default_rng(8)
    for _ in range(50):
        values = column("student_t3", generator, 200)
        weights = (10.0 ** generator.uniform(-40, 3, 200)).astype(np.float32)
        levels = fitted(fit, values, 8, weights)
        assert values.min() - 1e-2 <= levels[0] <= levels[-1] <= values.max() + 1e-2


@QUICK
@given(
    st.lists(st.floats(-50, 50, width=16), min_size=16, max_size=200, unique=True),
    st.sampled_from([2, 4, 8, 16]),
)
def test_quantiles_put_equally_many_values_to_a_level(distinct, entries):
    values = np.array(distinct, dtype=np.float32)
    borders = [-(-len(values) * cell // entries) for cell in range(entries + 1)]
    ordered = np.sort(values).astype(np.float64)
    cells = [ordered[a:b] for a, b in pairwise(borders)]
    expected = [cell.mean() for cell in cells]
    assert fitted(fit_quantiles, values, entries) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_weighted_quantiles_share_the_weight():
    values = np.array([3.0, 1.0, 2.0, 4.0], dtype=np.float32)
    weights = np.array([1.0, 6.0, 0.0, 5.0], dtype=np.float32)
    expected = [1.0, (3.0 + 20.0) / 6]
    assert fitted(fit_quantiles, values, 2, weights) == pytest.approx(expected)


@pytest.mark.case(29)
@QUICK
@given(
    st.lists(st.integers(-40, 40), max_size=50),
    st.lists(st.integers(-20, 20), min_size=1, max_size=16, unique=True),
)
def test_codes_name_the_nearest_level_and_the_lower_one_on_a_tie(numerators, level_numerators):
    values = np.array(numerators, dtype=np.float32) / 8
    levels = np.sort(np.array(level_numerators, dtype=np.float32)) / 4
    codes = np.full(len(values), 255, dtype=np.uint8)
    assign_codes(values, levels, codes)
    nearest = np.abs(values[:, None] - levels[None, :]).argmin(axis=1)  # argmin takes the first
    assert codes.tolist() == nearest.tolist()


@pytest.mark.case(33)
def test_codes_of_repeated_levels_still_name_a_nearest_one():
    levels = np.array([-1, 0, 0, 2, 2, 2], dtype=np.float32)
    values = np.array([-3, -0.5, 0, 0.25, 1, 1.5, 2, 9], dtype=np.float32)
    codes = np.empty(len(values), dtype=np.uint8)
    assign_codes(values, levels, codes)
    assert levels[codes].tolist() == [-1, -1, 0, 0, 0, 2, 2, 2]


def test_256_levels_use_every_code():
    levels = np.arange(256, dtype=np.float32)
    codes = np.empty(256, dtype=np.uint8)
    assign_codes(levels, levels, codes)
    assert codes.tolist() == list(range(256))
