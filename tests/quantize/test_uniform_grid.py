"""The uniform grid against the asymmetric min-max quantizer written out entry by entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quantize_references import Led, damped, explicit_obs, random_problem, recipe, solve

from claq_exp.errors import ConfigError
from claq_exp.quantize.codebook import Uniform
from claq_exp.quantize.precision import Fixed, OutlierOrder
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import Gptq, Nearest


def min_max_grid(weight: np.ndarray, bits: int, group_size: int):
    """Return functions of (row, column, value) -> code and (row, column, code) -> value.

    The grid of a row and group spans its weights and zero; its scale is stored in float16, as a
    normal number, and its zero point is the code of the weight 0 (GPTQ's reference code).  All
    is float32, as in the package: a quotient on the border of two codes goes to the same side.
    """
    top = np.float32(2**bits - 1)
    group_size = group_size or weight.shape[1]

    def grid(row: int, column: int) -> tuple[float, float]:
        first = column // group_size * group_size
        members = [np.float32(value) for value in weight[row, first : first + group_size]]
        zero = np.float32(0)
        low, high = min([*members, zero]), max([*members, zero])
        scale = np.float32(np.float16(max((high - low) / top, np.float32(2.0**-14))))
        return scale, np.clip(np.round(-low / scale), 0, top)

    def code(row: int, column: int, value: float) -> int:
        scale, zero = grid(row, column)
        return int(np.clip(np.round(np.float32(value) / scale) + zero, 0, top))

    def decode(row: int, column: int, level: int) -> float:
        scale, zero = grid(row, column)
        return float(scale * (level - zero))

    return code, decode


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [0, 1, 4, 5, 17, 64])
def test_round_to_nearest_is_the_min_max_quantizer(bits, group_size):
    weight, hessian = random_problem(rows=9, columns=17, seed=bits)
    weight[0] = weight[0].abs()
    weight[1] = -weight[1].abs()
    chosen = recipe(codebook=Uniform(group_size), precision=Fixed(bits), solver=Nearest())
    result = solve(weight, hessian, chosen).quantized
    code, decode = min_max_grid(weight.numpy(), bits, group_size)
    dequantized = result.dequantize()
    for row in range(9):
        for column in range(17):
            expected = code(row, column, weight[row, column].item())
            assert result.codes[row, column] == expected
            assert dequantized[row, column].item() == decode(row, column, expected)


@pytest.mark.parametrize("group_size", [0, 5])
@pytest.mark.parametrize("block_size", [1, 4, 128])
def test_gptq_on_a_grid_is_optimal_brain_surgery_on_the_grid_of_the_first_weights(
    group_size, block_size
):
    weight, hessian = random_problem(rows=12, columns=13, seed=1)
    code, decode = min_max_grid(weight.numpy(), 3, group_size)
    codes = np.zeros((12, 13), dtype=int)

    def quantize(column: int, values: np.ndarray) -> np.ndarray:
        codes[:, column] = [code(row, column, value) for row, value in enumerate(values)]
        return np.array([decode(row, column, level) for row, level in enumerate(codes[:, column])])

    order = np.argsort(-hessian.diagonal().numpy(), kind="stable")
    expected, compensated = explicit_obs(weight, damped(hessian, 0.01), order, quantize)
    chosen = recipe(
        codebook=Led(Uniform(group_size), compensated),
        precision=Fixed(3),
        solver=Gptq(block_size=block_size, damping=0.01),
    )
    result = solve(weight, hessian, chosen).quantized
    assert result.codes.tolist() == codes.tolist()
    assert np.array_equal(result.dequantize().numpy(), expected)


def test_a_zero_weight_stays_zero():
    weight, hessian = random_problem(rows=6, columns=8, seed=2)
    weight[:, 3] = 0
    weight[4] = 0
    chosen = recipe(codebook=Uniform(), precision=Fixed(4), solver=Nearest())
    dequantized = solve(weight, hessian, chosen).quantized.dequantize()
    assert not dequantized[:, 3].any()
    assert not dequantized[4].any()


def test_no_weight_moves_by_more_than_about_half_a_step():
    weight, hessian = random_problem(rows=8, columns=20, seed=3)
    chosen = recipe(codebook=Uniform(), precision=Fixed(4), solver=Nearest())
    moved = (solve(weight, hessian, chosen).quantized.dequantize() - weight).abs()
    step = (weight.amax(dim=1) - weight.amin(dim=1)) / 15
    # the zero point is rounded too, which costs the extreme weights up to half a step more
    assert (moved <= 1.01 * step[:, None]).all()
    assert moved.mean() < 0.3 * step.mean()


@pytest.mark.parametrize(
    "changes", [{"precision": OutlierOrder(2.5)}, {"reservation": FixedReservation(0.1)}]
)
def test_mixed_widths_and_reservation_are_refused_before_any_work(changes):
    with pytest.raises(ConfigError, match="codebook=kmeans"):
        recipe(codebook=Uniform(), **changes)


def test_a_negative_group_size_is_refused():
    with pytest.raises(ConfigError, match=r"codebook\.group_size"):
        Uniform(group_size=-1)


def test_group_size_covers_rows_with_a_shorter_last_group():
    weight, hessian = random_problem(rows=3, columns=10, seed=4)
    result = solve(weight, hessian, recipe(codebook=Uniform(4), solver=Nearest())).quantized
    assert result.scales.shape == (3, 3)
    assert result.layout().groups == 3
    assert result.scales.dtype == torch.float16
