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
from torch import Tensor

pytest.importorskip("triton")

from claq_exp.quantize.quantized import (
    ColumnCodebooks,
    Levels,
    QuantizedWeight,
    Reserved,
    RowGrid,
    SharedCodebooks,
)
from claq_exp.runtime.kernels import triton as under_test
from claq_exp.runtime.kernels.triton import TritonKernel, dense_rows
from claq_exp.runtime.operand import Operand, operand_of

MIXES = ([1], [2], [3], [4], [5], [6], [7], [8], [2, 4], [1, 2, 3, 4, 5, 6, 7, 8])
ROUNDOFF = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8 if torch.cuda.is_available() else 2.0**-7,  # the interpreter cuts off
    torch.float32: 2.0**-24,
}


def reserve(codes: Tensor, share: float, generator: torch.Generator) -> Reserved:
    """Reserve some entries and set their codes [out, in] to 0, as solvers do."""
    chosen = torch.rand(codes.t().shape, generator=generator) < share
    columns, rows = chosen.nonzero(as_tuple=True)
    codes[rows, columns] = 0
    values = (10 * torch.randn(len(rows), generator=generator)).half()
    return Reserved(chosen.sum(1), rows, values)


def matrix(
    rows: int,
    columns: int,
    widths: list[int],
    reserved: float = 0.0,
    row_scales: bool = False,
    shared: bool = False,
    seed: int = 0,
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    order = torch.randperm(columns, generator=generator)
    bits = torch.tensor(widths)[order % len(widths)].to(torch.uint8)
    codes = (torch.rand(rows, columns, generator=generator) * 2.0**bits).to(torch.uint8)
    scales = (draw(rows).abs() + 0.1).half() if row_scales else None
    levels: Levels
    if shared:
        books = {width: draw(2**width).sort().values.half() for width in set(bits.tolist())}
        levels = SharedCodebooks(books, draw(columns, 2).half(), scales)
    else:
        values = draw(columns, 2 ** int(bits.max())).half()
        values[torch.arange(values.shape[1]) >= 2 ** bits[:, None].int()] = 0
        levels = ColumnCodebooks(values, scales)
    return QuantizedWeight(codes, bits, levels, reserve(codes, reserved, generator))


def grid_matrix(
    rows: int, columns: int, width: int, group_size: int, reserved: float = 0.0
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(2**width, (rows, columns), generator=generator, dtype=torch.uint8)
    groups = -(-columns // group_size)
    scales = (torch.rand(rows, groups, generator=generator) + 0.1).half()
    zeros = torch.randint(2**width, (rows, groups), generator=generator, dtype=torch.uint8)
    bits = torch.full((columns,), width, dtype=torch.uint8)
    levels = RowGrid(scales, zeros, group_size)
    return QuantizedWeight(codes, bits, levels, reserve(codes, reserved, generator))


def operand(weight: QuantizedWeight, device: str) -> Operand:
    return operand_of(
        weight.layout(), {suffix: tensor.to(device) for suffix, tensor in weight.pack().items()}
    )


def activations(n: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, columns, generator=generator).to(device, dtype)


def check(weight: QuantizedWeight, inputs: Tensor, found: Tensor) -> None:
    """Compare with the float64 product.

    n sums of float32 terms err by at most n units of roundoff of the sum of their magnitudes (two
    more for the products, 2**-20 for three passes of TF32); the terms are those of all codes, of
    reserved entries and of what those replace.  Outputs, and above 16 inputs weights, are rounded.
    """
    dense = weight.dequantize().double()
    codes_only = replace(weight, reserved=Reserved.none(len(weight.column_bits))).dequantize()
    size = dense.abs() + codes_only.double().abs()
    if isinstance(weight.levels, RowGrid):
        group = torch.arange(dense.shape[1]) // weight.levels.group_size
        scales, zeros = weight.levels.scales.double(), weight.levels.zeros.double()
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
    weight = matrix(70, 19, widths, reserved=0.05, row_scales=True)
    inputs = activations(n, 19, torch.float32, device)
    check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


@pytest.mark.parametrize("widths", MIXES)
@pytest.mark.parametrize("row_scales", [False, True])
def test_the_dense_copy_is_exact(device, widths, row_scales):
    weight = matrix(49, 37, widths, reserved=0.05, row_scales=row_scales)
    expected = weight.dequantize()
    packed = operand(weight, device)
    assert torch.equal(dense_rows(packed, torch.float32, 0, 49).cpu(), expected)
    assert torch.equal(dense_rows(packed, torch.float32, 5, 38).cpu(), expected[5:38])
    assert torch.equal(dense_rows(packed, torch.float16, 0, 49).cpu(), expected.half())


@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("n", [0, 1, 2, 4, 5, 16, 17, 33])
def test_batches_and_dtypes(device, dtype, n):
    weight = matrix(49, 33, [2, 4], reserved=0.02, row_scales=True)
    inputs = activations(n, 33, dtype, device)
    check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


@pytest.mark.parametrize("n", [1, 5, 17])
@pytest.mark.parametrize(
    ("rows", "columns", "widths"), [(1, 5, [3]), (49, 1, [2]), (1, 1, [8]), (576, 3, [1, 2])]
)
def test_odd_shapes(device, rows, columns, widths, n):
    weight = matrix(rows, columns, widths, reserved=0.2)
    inputs = activations(n, columns, torch.float16, device)
    check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


@pytest.mark.parametrize("n", [1, 4, 6, 20])
def test_shared_codebooks(device, n):
    weight = matrix(40, 24, [2, 3], reserved=0.05, row_scales=True, shared=True)
    packed = operand(weight, device)
    assert torch.equal(dense_rows(packed, torch.float32, 0, 40).cpu(), weight.dequantize())
    for dtype in (torch.float16, torch.float32):
        inputs = activations(n, 24, dtype, device)
        check(weight, inputs, TritonKernel().multiply(packed, inputs))


@pytest.mark.parametrize(("width", "group_size"), [(2, 16), (4, 7), (3, 64), (8, 1)])
def test_row_grids_with_a_short_last_group(device, width, group_size):
    weight = grid_matrix(49, 37, width, group_size, reserved=0.05)
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
    weight = matrix(33, 150, [4])
    codes = weight.codes.clone()
    codes[7] = 0
    counts, rows = torch.ones(150, dtype=torch.int64), torch.full((150,), 7)
    values = torch.linspace(-3, 3, 150).half()
    weight = replace(weight, codes=codes, reserved=Reserved(counts, rows, values))
    for n in (2, 8, 17):
        inputs = activations(n, 150, torch.float32, device)
        check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


def test_columns_shared_between_programs_give_the_same_product(device):
    weight = matrix(70, 150, [2, 4], reserved=0.01)
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
    weight = matrix(49, 33, [3], reserved=0.05)
    inputs = activations(17, 33, torch.float32, device)
    check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


def test_sums_that_would_not_fit_go_through_the_dense_copy(device, monkeypatch):
    monkeypatch.setattr(under_test, "PARTIAL_BYTES", 100)
    weight = matrix(49, 33, [3], reserved=0.05)
    inputs = activations(2, 33, torch.float32, device)
    check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


@pytest.mark.parametrize("n", [1, 8, 40])
def test_the_same_product_twice_is_the_same(device, n):
    packed = operand(matrix(70, 40, [2, 4], reserved=0.05, row_scales=True), device)
    inputs = activations(n, 40, torch.bfloat16, device)
    kernel = TritonKernel()
    assert torch.equal(kernel.multiply(packed, inputs), kernel.multiply(packed, inputs))


def test_inputs_need_not_be_contiguous(device):
    weight = matrix(40, 20, [4])
    inputs = activations(20, 3, torch.float32, device).t()
    check(weight, inputs, TritonKernel().multiply(operand(weight, device), inputs))


def test_what_was_prepared_goes_with_its_operand(device):
    kernel = TritonKernel()
    first, second = (operand(matrix(33, 9, [2], seed=seed), device) for seed in (1, 2))
    inputs = activations(1, 9, torch.float32, device)
    assert not torch.equal(kernel.multiply(first, inputs), kernel.multiply(second, inputs))
    assert len(kernel._prepared) == 2
    del first
    gc.collect()
    assert len(kernel._prepared) == 1


def test_codes_of_whole_words_are_not_copied(device):
    packed = operand(matrix(64, 9, [2]), device)
    kernel = TritonKernel()
    kernel.multiply(packed, activations(1, 9, torch.float32, device))
    (prepared,) = kernel._prepared.values()
    assert prepared.parts[0].codes.data_ptr() == packed.parts[0].codes.data_ptr()


def test_refusals(device, monkeypatch):
    kernel = TritonKernel()
    packed = operand(matrix(33, 9, [2]), device)
    assert kernel.refusal(packed) is None
    assert "beyond float16" in (kernel.refusal(replace(packed, clamps=True)) or "")
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    on_cpu = operand(matrix(33, 9, [2]), "cpu")
    assert "not on a CUDA device" in (kernel.refusal(on_cpu) or "")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert kernel.refusal(packed) == "Triton is not installed"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("n", [1, 8, 40])
def test_a_recorded_product_is_the_same(n):
    packed = operand(matrix(70, 40, [2, 4], reserved=0.05), "cuda")
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
