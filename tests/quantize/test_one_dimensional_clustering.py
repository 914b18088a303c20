"""fit_levels against brute force and two independent libraries; assign_codes against argmin."""

from __future__ import annotations

import kmeans1d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import best_error, squared_error
from sklearn.cluster import KMeans as ReferenceKMeans
from threadpoolctl import threadpool_limits

from claq_exp.quantize.codebook.clustering import assign_codes, fit_levels

QUICK = settings(max_examples=80, deadline=None, derandomize=True)


def sorted_column(draw, count: int) -> np.ndarray:
    return np.sort(draw(count).astype(np.float32))


def with_outliers(generator: np.random.Generator, count: int) -> np.ndarray:
    values = generator.normal(size=count)
    values[:4] = generator.uniform(15, 60, 4) * generator.choice([-1.0, 1.0], 4)
    return values


COLUMNS = {
    "normal": lambda generator: lambda count: generator.normal(size=count),
    "student_t5": lambda generator: lambda count: generator.standard_t(5, size=count),
    "student_t3": lambda generator: lambda count: generator.standard_t(3, size=count),
    "laplace": lambda generator: lambda count: generator.laplace(size=count),
    "integers": lambda generator: lambda count: generator.integers(-20, 20, count) * 0.5,
    "outliers": lambda generator: lambda count: with_outliers(generator, count),
}

column_values = st.lists(st.floats(-1e6, 1e6, width=32), max_size=60).map(
    lambda values: np.sort(np.array(values, dtype=np.float32))
)
entry_counts = st.sampled_from([2, 4, 8, 16])


@pytest.mark.parametrize("kind", ["normal", "student_t3", "integers"])
def test_small_columns_come_close_to_the_best_of_all_partitions(kind):
    generator = np.random.default_rng(1)
    draw = COLUMNS[kind](generator)
    excess = []
    for _ in range(80):
        entries = int(generator.choice([2, 3, 4, 5, 8]))
        values = sorted_column(draw, int(generator.integers(2, 13)))
        found = squared_error(values, fit_levels(values, entries))
        best = best_error(values, entries)
        assert found >= best * (1 - 1e-9) - 1e-12
        excess.append(found / best - 1 if best > 1e-12 else found)
    assert np.mean(excess) < 0.01
    assert np.mean(np.array(excess) < 1e-6) > 0.95


@pytest.mark.parametrize("kind", ["normal", "student_t5", "student_t3", "laplace", "outliers"])
@pytest.mark.parametrize(("entries", "mean_excess"), [(4, 0.005), (8, 0.01), (16, 0.02)])
def test_long_columns_come_close_to_the_global_optimum_of_kmeans1d(kind, entries, mean_excess):
    generator = np.random.default_rng(entries)
    draw = COLUMNS[kind](generator)
    excess = []
    for _ in range(15):
        values = sorted_column(draw, int(generator.integers(200, 1501)))
        optimum = kmeans1d.cluster(values.astype(float).tolist(), entries).centroids
        best = squared_error(values, np.array(optimum))
        found = squared_error(values, fit_levels(values, entries))
        assert found >= best * (1 - 1e-9)
        excess.append(found / best - 1)
    assert np.mean(excess) < mean_excess


@pytest.mark.parametrize("kind", ["normal", "student_t3", "outliers"])
@pytest.mark.parametrize("entries", [4, 8, 16])
def test_levels_are_on_average_no_worse_than_those_of_scikit_learn(kind, entries):
    generator = np.random.default_rng(10 + entries)
    draw = COLUMNS[kind](generator)
    ratios = []
    for seed in range(8):
        values = sorted_column(draw, 576)
        with threadpool_limits(1):  # threads cost more than they give on so few values
            reference = ReferenceKMeans(entries, n_init=1, random_state=seed).fit(values[:, None])
        theirs = squared_error(values, reference.cluster_centers_[:, 0])
        ratios.append(squared_error(values, fit_levels(values, entries)) / theirs)
    assert np.mean(ratios) <= 1.005


@QUICK
@given(column_values, entry_counts)
def test_levels_are_ascending_finite_inside_the_column_and_the_same_every_time(values, entries):
    levels = fit_levels(values, entries)
    assert levels.shape == (entries,)
    assert np.isfinite(levels).all()
    assert (np.diff(levels) >= 0).all()
    assert np.array_equal(levels, fit_levels(values.copy(), entries))
    if len(values):
        smallest, largest = float(values[0]), float(values[-1])
        slack = 1e-9 * max(-smallest, largest)
        assert levels[0] >= smallest - slack
        assert levels[-1] <= largest + slack


@QUICK
@given(column_values, entry_counts)
def test_more_than_one_level_never_costs_more_than_the_mean_alone(values, entries):
    levels = fit_levels(values, entries)
    if len(values):
        mean = values.astype(np.float64).mean()
        assert squared_error(values, levels) <= squared_error(values, [mean]) * (1 + 1e-9) + 1e-12


@QUICK
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=16, unique=True),
    st.integers(1, 5),
)
def test_no_more_distinct_values_than_entries_gives_zero_error(distinct, repeats):
    values = np.sort(np.repeat(np.array(distinct, dtype=np.float32), repeats))
    levels = fit_levels(values, 16)
    assert squared_error(values, levels) == 0.0


def test_a_constant_column_gets_its_value_as_every_level():
    levels = fit_levels(np.full(37, -0.375, dtype=np.float32), 8)
    assert levels.tolist() == [-0.375] * 8


def test_an_empty_column_gets_zeros():
    assert fit_levels(np.zeros(0, dtype=np.float32), 4).tolist() == [0.0] * 4


@pytest.mark.parametrize("entries", [4, 8, 16])
def test_one_huge_outlier_gets_a_level_of_its_own_and_leaves_the_rest_well_covered(entries):
    generator = np.random.default_rng(3)
    rest = sorted_column(COLUMNS["normal"](generator), 300)
    values = np.append(rest, np.float32(1e6))
    levels = fit_levels(values, entries)
    assert levels[-1] == 1e6
    best = kmeans1d.cluster(rest.astype(float).tolist(), entries - 1).centroids
    assert squared_error(rest, levels) <= 1.2 * squared_error(rest, np.array(best))


def test_repeated_values_weigh_as_often_as_they_occur():
    values = np.array([0.0] * 90 + [1.0] * 10 + [5.0], dtype=np.float32)
    levels = fit_levels(values, 2)
    assert levels == pytest.approx([0.1, 5.0])


@pytest.mark.parametrize("power", [-20, -3, 1, 40])
@pytest.mark.parametrize("entries", [4, 16])
def test_levels_scale_with_the_column(entries, power):
    values = sorted_column(COLUMNS["student_t5"](np.random.default_rng(5)), 400)
    scaled = fit_levels(values * np.float32(2.0**power), entries)
    expected = fit_levels(values, entries) * 2.0**power
    assert scaled == pytest.approx(expected, rel=1e-9)


@QUICK
@given(
    st.lists(st.integers(-8000, 8000), min_size=1, max_size=60),
    entry_counts,
    st.integers(-999, 999),
)
def test_levels_shift_with_the_column(numerators, entries, shift):
    values = np.sort(np.array(numerators, dtype=np.float32) / 1024)  # exact after the shift too
    levels = fit_levels(values, entries)
    shifted = fit_levels(values + np.float32(shift), entries)
    assert shifted == pytest.approx(levels + shift, abs=1e-9)


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
