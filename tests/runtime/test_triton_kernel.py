"""Products with packed matrices by Triton against float64, on a GPU or in the interpreter."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packed_matrices import operand, random_weight
from torch import Tensor

pytest.importorskip("triton")

from claq_exp.payload import RowGrid
from claq_exp.payload.columns import ColumnPayload, Reserved
from claq_exp.runtime.kernels import triton as under_test
from claq_exp.runtime.kernels import triton_decode
from claq_exp.runtime.kernels.triton import TritonKernel, dense_rows

MIXES = ([1], [2], [3], [4], [5], [6], [7], [8], [2, 4], [1, 2, 3, 4, 5, 6, 7, 8])
ROUNDOFF = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8 if torch.cuda.is_available() else 2.0**-7,  # the interpreter cuts off
    torch.float32: 2.0**-24,
}


def activations(n: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, columns, generator=generator).to(device, dtype)


def check(weight: ColumnPayload, inputs: Tensor, found: Tensor) -> None:
    """Compare with the float64 product.

    n sums of float32 terms err by at most n units of roundoff of the sum of their magnitudes (two
    more for the products, 2**-20 for three passes of TF32); the terms are those of all codes, of
    reserved entries and of what those replace.  Outputs, and above 16 inputs weights, are rounded.
    """
    dense = weight.dequantize().double()
    codes_only = replace(weight, reserved=Reserved.none(len(weight.column_bits))).dequantize()
    size = dense.abs() + codes_only.double().abs()
    if isinstance(weight, RowGrid):
        group = torch.arange(dense.shape[1]) // weight.group_size
        scales, zeros = weight.scales.double(), weight.zeros.double()
        size += 2 * (scales * zeros)[:, group]
    x = inputs.cpu().double()
    expected, magnitude = x @ dense.t(), x.abs() @ size.t()
    unit = ROUNDOFF[inputs.dtype]
    bound = (2 * dense.shape[1] + 2) * 2.0**-24 * magnitude + unit * expected.abs()
    if len(inputs) > 2:
        bound += 2.0**-20 * magnitude
    if len(inputs) > 16:
        bound += 2 * unit * magnitude
    assert found.dtype == inputs.dtype
    assert found.shape == expected.shape
    assert ((found.cpu().double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("widths", MIXES)
@pytest.mark.parametrize("n", [1, 3, 5])
def test_every_width_multiplies_like_the_dense_matrix(device, widths, n):
    weight = random_weight(70, 19, widths, reserved=0.05, row_scales=True)
    inputs = activations(n, 19, torch.float32, device)
    check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("n", [1, 2, 5, 17])
def test_levels_of_rows(device, width, n):
    weight = random_weight(70, 19, [width], reserved=0.05, by_row=True)
    inputs = activations(n, 19, torch.float16 if n == 5 else torch.float32, device)
    check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_rows_with_levels_of_their_own_are_exact(device, width):
    weight = random_weight(49, 37, [width], reserved=0.05, by_row=True)
    packed, dense = operand(weight, device), weight.dequantize()
    rows = torch.tensor([3, 48, 0, 3, 17], device=device)
    found = TritonKernel().rows(packed, rows, torch.float32)
    assert torch.equal(found.cpu(), dense[rows.cpu()])
    assert torch.equal(dense_rows(packed, torch.float32, 5, 44).cpu(), dense[5:44])


@pytest.mark.parametrize("widths", MIXES)
@pytest.mark.parametrize("row_scales", [False, True])
def test_the_dense_copy_is_exact(device, widths, row_scales):
    weight = random_weight(49, 37, widths, reserved=0.05, row_scales=row_scales)
    expected = weight.dequantize()
    packed = operand(weight, device)
    assert torch.equal(dense_rows(packed, torch.float32, 0, 49).cpu(), expected)
    assert torch.equal(dense_rows(packed, torch.float32, 5, 38).cpu(), expected[5:38])
    assert torch.equal(dense_rows(packed, torch.float16, 0, 49).cpu(), expected.half())


ASKED = torch.tensor([48, 0, 7, 7, 31, 48, 32])


@pytest.mark.parametrize("widths", MIXES)
@pytest.mark.parametrize("reserved", [0.0, 0.1])
def test_rows_that_are_asked_for_are_exact(device, widths, reserved):
    weight = random_weight(49, 37, widths, reserved=reserved, row_scales=reserved > 0)
    packed, kernel = operand(weight, device), TritonKernel()
    for index in (ASKED, ASKED[:1], ASKED[:0], torch.arange(49).repeat(3)):
        expected = weight.dequantize()[index]
        for dtype in (torch.float32, torch.float16):
            found = kernel.rows(packed, index.to(device), dtype)
            assert found.dtype == dtype
            assert torch.equal(found.cpu(), expected.to(dtype))


@pytest.mark.parametrize("width", [1, 3, 8])
def test_rows_of_a_grid_are_exact(device, width):
    weight = random_weight(49, 37, [width], group_size=5)
    found = TritonKernel().rows(operand(weight, device), ASKED.to(device), torch.float32)
    assert torch.equal(found.cpu(), weight.dequantize()[ASKED])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the assertion ends a GPU's process")
@pytest.mark.parametrize("row", [-1, 49])
def test_a_row_that_the_matrix_has_not_is_an_error(row):
    with pytest.raises(RuntimeError):
        TritonKernel().rows(
            operand(random_weight(49, 5, [8]), "cpu"), torch.tensor([0, row]), torch.float32
        )


@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("n", [0, 1, 2, 4, 5, 16, 17, 33])
def test_batches_and_dtypes(device, dtype, n):
    weight = random_weight(49, 33, [2, 4], reserved=0.02, row_scales=True)
    inputs = activations(n, 33, dtype, device)
    check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


@pytest.mark.case(71)
@pytest.mark.parametrize("n", [1, 5, 17])
@pytest.mark.parametrize(
    ("rows", "columns", "widths"), [(1, 5, [3]), (49, 1, [2]), (1, 1, [8]), (576, 3, [1, 2])]
)
def test_odd_shapes(device, rows, columns, widths, n):
    weight = random_weight(rows, columns, widths, reserved=0.2)
    inputs = activations(n, columns, torch.float16, device)
    check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


@pytest.mark.parametrize("n", [1, 4, 6, 20])
def test_shared_codebooks(device, n):
    weight = random_weight(40, 24, [2, 3], reserved=0.05, row_scales=True, shared=True)
    packed = operand(weight, device)
    assert torch.equal(dense_rows(packed, torch.float32, 0, 40).cpu(), weight.dequantize())
    for dtype in (torch.float16, torch.float32):
        inputs = activations(n, 24, dtype, device)
        check(weight, inputs, TritonKernel().multiply(packed, inputs))


@pytest.mark.parametrize(
    ("widths", "shared", "dtype", "tiles"),
    [
        ([3], False, torch.float32, False),
        ([2, 5], True, torch.bfloat16, False),
        ([3], False, torch.bfloat16, True),
        ([4], False, torch.float32, True),
    ],
)
def test_tiles_that_few_devices_have_the_shared_memory_for_are_left_out(
    device, monkeypatch, widths, shared, dtype, tiles
):
    class Counted:
        launches = 0

        def __getitem__(self, grid):
            self.launches += 1
            return kernel[grid]

    kernel, counted = triton_decode.sum_tiles, Counted()
    monkeypatch.setattr(triton_decode, "sum_tiles", counted)
    weight = random_weight(40, 24, widths, shared=shared, row_scales=shared)
    inputs = activations(5, 24, dtype, device)
    check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))
    assert bool(counted.launches) == tiles


GROUPED = [((2,), 16), ((4,), 7), ((3,), 64), ((8,), 1)]
MIXED = [((2, 4), 7), ((1, 3, 4), 5)]


@pytest.mark.parametrize(
    ("widths", "group_size", "table"),
    [(*case, False) for case in GROUPED] + [(*case, True) for case in GROUPED + MIXED],
)
def test_row_grids_and_tables_with_a_short_last_group(device, widths, group_size, table):
    weight = random_weight(49, 37, widths, group_size=group_size, reserved=0.05, table=table)
    packed = operand(weight, device)
    assert torch.equal(dense_rows(packed, torch.float32, 0, 49).cpu(), weight.dequantize())
    kernel = TritonKernel()
    for n, dtype in (
        (1, torch.float32),
        (4, torch.bfloat16),
        (7, torch.bfloat16),
        (18, torch.half),
    ):
        inputs = activations(n, 37, dtype, device)
        check(weight, inputs, kernel.multiply(packed, inputs))


def test_a_row_of_many_reserved_entries(device):
    weight = random_weight(33, 150, [4])
    codes = weight.codes.clone()
    codes[7] = 0
    counts, rows = torch.ones(150, dtype=torch.int64), torch.full((150,), 7)
    values = torch.linspace(-3, 3, 150).half()
    weight = replace(weight, codes=codes, reserved=Reserved(counts, rows, values))
    for n in (2, 8, 17):
        inputs = activations(n, 150, torch.float32, device)
        check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


def test_columns_shared_between_programs_give_the_same_product(device):
    weight = random_weight(70, 150, [2, 4], reserved=0.01)
    chosen = {"lanes": 4, "unroll": 2, "programs": 1000}
    tuning = {
        "lookups": {"default": chosen},
        "joint": {"default": {**chosen, "runs": 2}},
        "tiles": {"default": {"lanes": 16, "warps": 4, "unroll": 1, "programs": 1000}},
    }
    for n in (1, 4, 9):
        inputs = activations(n, 150, torch.float32, device)
        check(weight, inputs, TritonKernel(tuning).multiply(operand(weight, device), inputs))


def test_the_dense_copy_is_made_in_pieces_where_it_is_large(device, monkeypatch):
    monkeypatch.setattr(under_test, "DENSE_BYTES", 20 * 33 * 4)
    weight = random_weight(49, 33, [3], reserved=0.05)
    inputs = activations(17, 33, torch.float32, device)
    check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


def test_sums_that_would_not_fit_go_through_the_dense_copy(device, monkeypatch):
    monkeypatch.setattr(under_test, "PARTIAL_BYTES", 100)
    weight = random_weight(49, 33, [3], reserved=0.05)
    inputs = activations(2, 33, torch.float32, device)
    check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


@pytest.mark.parametrize("n", [1, 8, 40])
def test_the_same_product_twice_is_the_same(device, n):
    packed = operand(random_weight(70, 40, [2, 4], reserved=0.05, row_scales=True), device)
    inputs = activations(n, 40, torch.bfloat16, device)
    kernel = TritonKernel()
    assert torch.equal(kernel.multiply(packed, inputs), kernel.multiply(packed, inputs))


@pytest.mark.case(71)
def test_inputs_need_not_be_contiguous(device):
    weight = random_weight(40, 20, [4])
    inputs = activations(20, 3, torch.float32, device).t()
    check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


def test_what_was_prepared_goes_with_its_operand(device):
    kernel = TritonKernel()
    first, second = (operand(random_weight(33, 9, [2], seed=seed), device) for seed in (1, 2))
    inputs = activations(1, 9, torch.float32, device)
    assert not torch.equal(kernel.multiply(first, inputs), kernel.multiply(second, inputs))
    assert len(kernel._prepared) == 2
    del first
    gc.collect()
    assert len(kernel._prepared) == 1


def test_codes_of_whole_words_are_not_copied(device):
    packed = operand(random_weight(64, 9, [2]), device)
    kernel = TritonKernel()
    kernel.multiply(packed, activations(1, 9, torch.float32, device))
    (prepared,) = kernel._prepared.values()
    assert prepared.parts[0].codes.data_ptr() == packed.parts[0].codes.data_ptr()


def test_refusals(device, monkeypatch):
    kernel = TritonKernel()
    packed = operand(random_weight(33, 9, [2]), device)
    assert kernel.refusal(packed) is None
    assert "beyond float16" in (kernel.refusal(replace(packed, clamps=True)) or "")
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    on_cpu = operand(random_weight(33, 9, [2]), "cpu")
    assert "not on a CUDA device" in (kernel.refusal(on_cpu) or "")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert kernel.refusal(packed) == "Triton is not installed"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("n", [1, 8, 40])
def test_a_recorded_product_is_the_same(n):
    packed = operand(random_weight(70, 40, [2, 4], reserved=0.05), "cuda")
    inputs = activations(n, 40, torch.bfloat16, "cuda")
    kernel = TritonKernel()
    expected = kernel.multiply(packed, inputs)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        found = kernel.multiply(packed, inputs)
    recorded.replay()
    assert torch.equal(found, expected)


def test_without_a_gpu_the_benchmark_says_so_in_one_line():
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_linear.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no CUDA device" in done.stderr
