"""Tables with group scales against slow float64 references, and against llama.cpp's IQ4_NL."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import given
from hypothesis import strategies as st
from quantize_references import Led, damped, explicit_obs, random_problem, recipe, solve

from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.payload import GroupTable, unpack_weight
from claq_exp.payload.columns import Reserved
from claq_exp.payload.group_table import GroupTableLayout
from claq_exp.quantize.codebook import GroupTableCodebook
from claq_exp.quantize.codebook.table_fit import (
    CLIPS,
    NO_MASK,
    best_scale,
    improve_table,
    learn_table,
    round_scales,
    round_to_table,
    search_scales,
)
from claq_exp.quantize.precision import Fixed, OutlierOrder
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import Gptq, Nearest, QuantEase

BLOCK = 32  # weights of a block of IQ4_NL
IQ4_NL = quants.IQ4_NL.kvalues


def rows_and_weights(rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    dice = np.random.default_rng(seed)
    weight = dice.standard_normal((rows, columns)) * np.exp(dice.normal(size=(rows, 1)))
    return weight.astype(np.float32), dice.uniform(0.1, 3, columns).astype(np.float32)


def table_of(entries: int, seed: int) -> np.ndarray:
    levels = np.sort(np.random.default_rng(seed).uniform(-1, 1, entries))
    return (levels / np.abs(levels).max()).astype(np.float32)


def error_at(values, weights, table, scale) -> float:
    """The weighted squared error at a scale, in float64: every entry at its nearest level."""
    levels = np.asarray(table, np.float64) * float(scale)
    misses = np.abs(np.asarray(values, np.float64)[:, None] - levels[None, :]).min(axis=1)
    return float((weights * misses**2).sum())


def scales_of(weight, importance, table, size, left_out=NO_MASK) -> tuple[np.ndarray, float]:
    scales = np.zeros((len(weight), -(-weight.shape[1] // size)), dtype=np.float32)
    loss = search_scales(weight, importance, left_out, table, size, CLIPS, scales)
    return scales, loss


def found_scale(values, weights, table) -> tuple[float, float]:
    """The gain and the scale of a group."""
    scratch = np.empty(len(values), dtype=np.float32)
    gain, scale = best_scale(values, weights, table, CLIPS, np.float32(0), scratch)
    return float(gain), float(scale)


@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([2, 4, 8, 16]))
def test_the_gain_of_a_scale_is_what_it_takes_off_the_error(seed, count, entries):
    (values,), weights = rows_and_weights(1, count, seed)
    table = table_of(entries, seed)
    gain, scale = found_scale(values, weights, table)
    energy = float((weights * values.astype(np.float64) ** 2).sum())
    # the gain is of the codes before the last step of the scale; the nearest ones are no worse
    assert error_at(values, weights, table, scale) <= energy - gain + 1e-5 * energy


@pytest.mark.parametrize("entries", [2, 4, 8, 16])
def test_a_scale_is_about_as_good_as_the_best_of_all(entries):
    ratios = []
    for seed in range(30):
        (values,), weights = rows_and_weights(1, 32, seed)
        table = table_of(entries, seed)
        found = error_at(values, weights, table, found_scale(values, weights, table)[1])
        tried = np.linspace(0.2, 1.5, 700) * np.abs(values).max()
        best = min(error_at(values, weights, table, s) for s in [*tried, *-tried])
        ratios.append(found / best)
    assert np.mean(ratios) < 1.05
    assert np.max(ratios) < 1.5


def test_scales_are_those_of_each_group_alone_and_the_loss_is_their_sum():
    weight, importance = rows_and_weights(7, 21, seed=1)
    table = table_of(8, seed=2)
    scales, loss = scales_of(weight, importance, table, 8)
    total = 0.0
    for row in range(7):
        for group, first in enumerate(range(0, 21, 8)):
            own = slice(first, first + 8)
            alone, _ = scales_of(weight[row : row + 1, own].copy(), importance[own], table, 8)
            assert scales[row, group] == alone[0, 0]
            total += error_at(weight[row, own], importance[own], table, scales[row, group])
    assert loss == pytest.approx(total, rel=1e-2)


def test_what_is_left_out_does_not_count():
    weight, importance = rows_and_weights(5, 16, seed=3)
    table = table_of(4, seed=4)
    left_out = np.random.default_rng(5).uniform(size=weight.shape) < 0.3
    loud = np.where(left_out, np.float32(1e4), weight)
    first = scales_of(weight, importance, table, 8, left_out)
    second = scales_of(loud, importance, table, 8, left_out)
    assert np.array_equal(first[0], second[0])
    assert first[1] == pytest.approx(second[1], rel=1e-5)
    learned = [
        learn_table(given, importance, np.ones(5, dtype=np.float32), left_out, 8, 4)
        for given in (weight, loud)
    ]
    assert np.array_equal(*learned)


def slow_step(weight, importance, rows, scales, table, size) -> np.ndarray:
    """A step of weighted k-means of w / s, weighted by g h s^2, in float64."""
    values, weights = [], []
    for row in range(len(weight)):
        for column in range(weight.shape[1]):
            scale = float(scales[row, column // size])
            values.append(float(weight[row, column]) / scale)
            weights.append(float(rows[row]) * float(importance[column]) * scale**2)
    values, weights = np.array(values), np.array(weights)
    cells = np.abs(values[:, None] - table[None, :]).argmin(axis=1)
    return np.array(
        [
            np.average(values[cells == level], weights=weights[cells == level])
            if (cells == level).any()
            else table[level]
            for level in range(len(table))
        ]
    )


@pytest.mark.parametrize("entries", [2, 8, 16])
def test_a_table_moves_to_the_weighted_means_of_its_scaled_entries(entries):
    weight, importance = rows_and_weights(9, 20, seed=6)
    rows = np.random.default_rng(7).uniform(0.5, 2, 9).astype(np.float32)
    table = table_of(entries, seed=8)
    scales, _ = scales_of(weight, importance, table, 8)
    expected = slow_step(weight, importance, rows, scales, table.astype(np.float64), 8)
    improve_table(weight, importance, rows, NO_MASK, 8, scales, table)
    assert table == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert (np.diff(table) >= 0).all()


@pytest.mark.parametrize("entries", [4, 8, 16])
def test_a_learned_table_is_better_than_its_start_and_than_evenly_spaced_levels(entries):
    weight, importance = rows_and_weights(40, 64, seed=9)
    rows = np.ones(40, dtype=np.float32)
    table = learn_table(weight, importance, rows, NO_MASK, 32, entries)
    assert np.abs(table).max() == 1
    assert (np.diff(table) >= 0).all()
    _, loss = scales_of(weight, importance, table, 32)
    even = np.linspace(-1, 1, entries, dtype=np.float32)
    assert loss < 0.97 * scales_of(weight, importance, even, 32)[1]
    again = table.copy()
    scales, _ = scales_of(weight, importance, table, 32)
    improve_table(weight, importance, rows, NO_MASK, 32, scales, again)
    assert loss <= 1.02 * search_scales(weight, importance, NO_MASK, again, 32, CLIPS, scales)


def test_integers_of_scales_are_the_best_of_three_neighbours():
    weight, importance = rows_and_weights(6, 16, seed=10)
    table = table_of(8, seed=11)
    steps = (np.abs(weight).max(axis=1) / 31).astype(np.float32)
    near = np.random.default_rng(12).integers(-31, 32, (6, 2)).astype(np.float32)
    found = near.copy()
    round_scales(weight, importance, NO_MASK, table, 8, steps, 31, found)
    for row in range(6):
        for group in range(2):
            own = slice(8 * group, 8 * group + 8)
            tried = [np.clip(near[row, group] + move, -32, 31) for move in (-1, 0, 1)]
            best = min(
                error_at(weight[row, own], importance[own], table, t * steps[row]) for t in tried
            )
            chosen = error_at(
                weight[row, own], importance[own], table, found[row, group] * steps[row]
            )
            assert chosen == pytest.approx(best, rel=1e-5)


def tables_and_scales(matrix: GroupTable) -> list[tuple[np.ndarray, np.ndarray]]:
    """The table and the scales of each column, by the words of docs/format.md, in float64."""
    table, scales = matrix.table.double().numpy(), matrix.scales.double().numpy()
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    entries = groups = 0
    for width in sorted(set(matrix.column_bits.tolist())):
        columns = np.flatnonzero(matrix.column_bits.numpy() == width)
        for number, column in enumerate(columns.tolist()):
            own = table[entries : entries + 2**width]
            found[column] = own, scales[:, groups + number // matrix.group_size]
        entries += 2**width
        groups += -(-len(columns) // matrix.group_size)
    assert (entries, groups) == (len(table), scales.shape[1])
    return [found[column] for column in range(matrix.shape[1])]


@pytest.mark.parametrize("bits", [16, 6])
def test_columns_of_several_widths_stand_for_their_tables_times_their_scales(bits):
    weight, hessian = random_problem(20, 50, seed=20)
    asked = recipe(
        codebook=GroupTableCodebook(8, bits),
        precision=OutlierOrder(2.5),
        reservation=FixedReservation(0.05),
    )
    found = solve(weight, hessian, asked).quantized
    assert len(found.layout().widths()) == 2
    dense = found.dequantize().double().numpy()
    kept = np.zeros(dense.shape, dtype=bool)
    kept[found.reserved.rows, found.reserved.columns()] = True
    for column, (table, scale) in enumerate(tables_and_scales(found)):
        expected = table[found.codes[:, column].numpy()] * scale
        free = ~kept[:, column]
        assert dense[free, column] == pytest.approx(expected[free], rel=1e-6)
    again = unpack_weight(found.layout(), found.pack())
    assert torch.equal(again.dequantize(), found.dequantize())


def test_columns_with_more_bits_have_smaller_errors():
    weight, _ = random_problem(64, 96, seed=19)
    asked = recipe(
        codebook=GroupTableCodebook(32, 6),
        precision=OutlierOrder(3, low_bits=2, high_bits=4),
        solver=Nearest(),
    )
    found = solve(weight, torch.eye(96, dtype=torch.float64), asked).quantized
    missed = (found.dequantize() - weight).square().mean(dim=0) / weight.square().mean(dim=0)
    narrow, wide = missed[found.column_bits == 2], missed[found.column_bits == 4]
    assert len(narrow) == len(wide) == 48
    assert wide.mean() < 0.3 * narrow.mean()


def test_weights_are_rounded_to_the_nearest_level():
    weight, importance = rows_and_weights(6, 16, seed=10)
    table = table_of(8, seed=11)
    scales, _ = scales_of(weight, importance, table, 5)
    scales[2, 1] = 0
    rounded = np.empty_like(weight)
    round_to_table(weight, table, 5, scales, rounded)
    for (row, column), value in np.ndenumerate(rounded):
        offered = float(scales[row, column // 5]) * table.astype(np.float64)
        assert value == pytest.approx(offered[np.abs(offered - weight[row, column]).argmin()])


@pytest.mark.parametrize(("size", "bits"), [(4, 16), (5, 6), (64, 8)])
@pytest.mark.parametrize("precision", [Fixed(3), OutlierOrder(2.4)], ids=["fixed", "mixed"])
@pytest.mark.parametrize("block_size", [1, 128])
def test_gptq_on_tables_is_optimal_brain_surgery_on_them(size, bits, precision, block_size):
    weight, hessian = random_problem(rows=12, columns=13, seed=1)
    rule = GroupTableCodebook(size, bits)
    asked = recipe(codebook=rule, precision=precision, solver=Gptq())
    fixed = solve(weight, hessian, asked).quantized
    own = tables_and_scales(fixed)

    def quantize(column: int, values: np.ndarray) -> np.ndarray:
        table, scale = own[column]
        cells = np.abs(values[:, None] / scale[:, None] - table[None, :]).argmin(axis=1)
        return scale * table[cells]

    order = np.argsort(-hessian.diagonal().numpy(), kind="stable")
    expected, compensated = explicit_obs(weight, damped(hessian, 0.01), order, quantize)
    led = recipe(
        codebook=Led(rule, compensated), precision=precision, solver=Gptq(block_size=block_size)
    )
    found = solve(weight, hessian, led).quantized.dequantize()
    assert found.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("solver", [Nearest(), Gptq(), QuantEase()], ids=["rtn", "gptq", "cd"])
@pytest.mark.parametrize("scale_bits", [6, 16])
def test_more_bits_are_never_worse(solver, scale_bits):
    weight, hessian = random_problem(48, 96, seed=13)
    errors = [
        solve(
            weight,
            hessian,
            recipe(
                codebook=GroupTableCodebook(32, scale_bits), precision=Fixed(bits), solver=solver
            ),
        ).output_error
        for bits in range(1, 7)
    ]
    assert all(after < before for before, after in pairwise(errors))


def test_a_table_beats_the_uniform_grid_of_as_many_bits():
    from claq_exp.quantize.codebook import Uniform

    weight, hessian = random_problem(64, 96, seed=14)
    errors = [
        solve(weight, hessian, recipe(codebook=rule, solver=Nearest())).output_error
        for rule in (GroupTableCodebook(32), Uniform(32))
    ]
    assert errors[0] < 0.85 * errors[1]


def test_reserved_entries_are_the_largest_and_keep_their_values():
    weight, hessian = random_problem(40, 50, seed=15)
    rule = recipe(
        codebook=GroupTableCodebook(16, 6), reservation=FixedReservation(0.1), solver=Nearest()
    )
    found = solve(weight, hessian, rule).quantized
    assert found.layout().reserved == 200
    rows, columns = found.reserved.rows, found.reserved.columns()
    assert not found.codes[rows, columns].any()
    assert torch.equal(found.dequantize()[rows, columns], weight.half().float()[rows, columns])
    for column in range(50):
        kept = rows[columns == column].tolist()
        assert sorted(kept) == sorted(weight[:, column].abs().topk(4).indices.tolist())
    plain = solve(weight, hessian, replace(rule, reservation=recipe().reservation))
    assert solve(weight, hessian, rule).output_error < 0.8 * plain.output_error


def test_a_column_that_weighs_more_is_rounded_better():
    weight, hessian = random_problem(64, 32, seed=16)
    hessian = torch.eye(32, dtype=torch.float64)
    hessian[5, 5] = 1000
    rule = recipe(codebook=GroupTableCodebook(32), precision=Fixed(2), solver=Nearest())
    missed = (solve(weight, hessian, rule).quantized.dequantize() - weight).square().mean(dim=0)
    others = torch.cat([missed[:5], missed[6:]])
    assert missed[5] < 0.6 * others.mean()


@pytest.mark.parametrize(("field", "value"), [("group_size", 0), ("scale_bits", 9)])
def test_impossible_sizes_are_refused(field, value):
    with pytest.raises(ConfigError, match=rf"codebook\.{field}"):
        GroupTableCodebook(**{field: value})


@pytest.mark.parametrize("value", [65504.0, -65504.0])
@pytest.mark.parametrize("scale_bits", [6, 16])
def test_the_largest_weight_of_float16_is_kept(value, scale_bits):
    weight, hessian = random_problem(20, 6, seed=0)
    weight[3, 2] = value
    rule = recipe(codebook=GroupTableCodebook(3, scale_bits), precision=Fixed(4))
    solved = solve(weight, hessian, rule)
    assert solved.quantized.dequantize()[3, 2].item() == pytest.approx(value, rel=0.01)
    assert solved.quantized.finite()


def test_the_last_group_may_be_shorter_and_one_group_may_hold_all():
    weight, hessian = random_problem(6, 70, seed=17)
    for size, groups in ((32, 3), (64, 2), (100, 1)):
        found = solve(weight, hessian, recipe(codebook=GroupTableCodebook(size))).quantized
        assert found.scales.shape == (6, groups)
        assert found.layout().group_size == min(size, 70)


def test_the_ledger_counts_table_and_scales():
    layout = GroupTableLayout(rows=100, columns=64, columns_per_width={4: 64}, group_size=32)
    ledger = layout.ledger()
    assert (ledger.codes, ledger.codebooks, ledger.scales) == (25600, 256, 3200)
    two = replace(layout, columns_per_width={2: 20, 4: 44}).ledger()
    assert (two.codebooks, two.scales) == ((4 + 16) * 16, 100 * 3 * 16)
    short = replace(layout, scale_bits=6).ledger()
    assert short.scales == 100 * 16 + 100 * 2 * 6
    with pytest.raises(CheckpointError, match="scales of 3 bits"):
        replace(layout, scale_bits=3)


def iq4_nl_blocks(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Bytes of IQ4_NL as ggml lays them out: a float16, then 16 bytes of two codes each."""
    rows, columns = codes.shape
    parts = codes.reshape(rows, columns // BLOCK, 2, BLOCK // 2)
    packed = parts[:, :, 0] | (parts[:, :, 1] << 4)
    halves = scales.astype(np.float16)[:, :, None].view(np.uint8)
    return np.concatenate([halves, packed], axis=2).reshape(rows, -1)


def test_the_table_of_iq4_nl_gives_its_numbers():
    dice = np.random.default_rng(18)
    codes = dice.integers(0, 16, (5, 96)).astype(np.uint8)
    scales = dice.standard_normal((5, 3)).astype(np.float16)
    blocks = iq4_nl_blocks(codes, scales)
    expected = quants.dequantize(blocks, gguf.GGMLQuantizationType.IQ4_NL)
    payload = GroupTable(
        torch.from_numpy(codes),
        torch.full((96,), 4, dtype=torch.uint8),
        Reserved.none(96),
        torch.tensor(IQ4_NL).half(),
        torch.from_numpy(scales),
        BLOCK,
    )
    assert np.array_equal(payload.dequantize().numpy(), expected.reshape(5, 96))
    again = unpack_weight(payload.layout(), payload.pack())
    assert np.array_equal(again.dequantize().numpy(), expected.reshape(5, 96))
