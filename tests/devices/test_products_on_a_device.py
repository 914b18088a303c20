"""Packed matrices on a device that is not the CPU: decoded, multiplied, and differentiated."""

from __future__ import annotations

from dataclasses import replace

import pretend_device
import pytest
import torch
from torch import Tensor

from claq_exp.number_formats.formats import E2M1, BlockFormat
from claq_exp.number_formats.levels import encode_weight
from claq_exp.number_formats.table import FormatCodebooks
from claq_exp.payload import (
    BlockCodes,
    ColumnCodebooks,
    RowGrid,
    SharedCodebooks,
    operand_of,
)
from claq_exp.payload.columns import ColumnPayload, Reserved
from claq_exp.payload.operand import Operand
from claq_exp.runtime.kernels import choose_kernel, kernel_name
from claq_exp.runtime.kernels.reference import dense_rows

ROWS, COLUMNS = 36, 24


def weight(form: str) -> ColumnPayload:
    """A random matrix whose columns have 2 and 4 bits where the form lets them."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half()

    if form == "block format":
        grid = FormatCodebooks.fixed(BlockFormat(4, 16, "e4m3", E2M1))
        codes, blocks = encode_weight(normal(ROWS, COLUMNS).float(), grid)
        return BlockCodes.of(codes, blocks)
    widths = (4, 4) if form == "row grid" else (2, 4)
    bits = torch.tensor([*widths] * (COLUMNS // 2), dtype=torch.uint8)
    codes = (torch.rand(ROWS, COLUMNS, generator=generator) * 2.0**bits).to(torch.uint8)
    kept = torch.rand(COLUMNS, ROWS, generator=generator) < 0.05
    columns, rows = kept.nonzero(as_tuple=True)
    codes[rows, columns] = 0
    coded = codes, bits, Reserved(kept.sum(1), rows, normal(len(rows)))
    if form == "row grid":
        zeros = torch.randint(16, (ROWS, 3), generator=generator, dtype=torch.uint8)
        return RowGrid(*coded, normal(ROWS, 3).abs(), zeros, 8)
    if form == "shared codebooks":
        books = {width: normal(2**width).sort().values for width in (2, 4)}
        return SharedCodebooks(*coded, books, normal(COLUMNS, 2), normal(ROWS))
    values = normal(COLUMNS, 16)
    values[torch.arange(16) >= 2 ** bits[:, None].int()] = 0
    return ColumnCodebooks(*coded, values, normal(ROWS))


def operand(matrix: ColumnPayload, device: str) -> Operand:
    tensors = {suffix: tensor.to(device) for suffix, tensor in matrix.pack().items()}
    return operand_of(matrix.layout(), tensors)


FORMS = ["column codebooks", "shared codebooks", "row grid", "block format"]


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_is_decoded_and_multiplied_on_its_device(pretend, form):
    matrix = weight(form)
    there = operand(matrix, pretend)
    assert {tensor.device.type for tensor in there.derived_tensors()} == {pretend}
    assert torch.equal(dense_rows(there, 0, ROWS).cpu(), matrix.dequantize())
    inputs = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(4))
    found = choose_kernel("reference", there).multiply(there, inputs.to(pretend))
    assert torch.allclose(found.cpu(), inputs @ matrix.dequantize().t(), atol=1e-4)


@pytest.mark.parametrize("form", FORMS[:3])
@pytest.mark.parametrize("n", [1, 4, 16, 20])
def test_triton_gets_tensors_of_the_device_alone(pretend, monkeypatch, form, n):
    pytest.importorskip("triton")
    from claq_exp.runtime.kernels import triton_decode, triton_dense

    kernels = []
    for module, name in (
        (triton_decode, "sum_lookups"),
        (triton_decode, "sum_joint_lookups"),
        (triton_decode, "sum_tiles"),
        (triton_decode, "finish"),
        (triton_dense, "dequantize"),
    ):
        kernels.append(pretend_device.interpreted(getattr(module, name)))
        monkeypatch.setattr(module, name, kernels[-1])
    matrix = weight(form)
    there = operand(matrix, pretend)
    kernel = choose_kernel("triton", there)
    inputs = torch.randn(n, COLUMNS, generator=torch.Generator().manual_seed(4))
    on_device = inputs.to(pretend)
    kernel.multiply(there, on_device)
    with pretend_device.traffic() as seen:
        found = kernel.multiply(there, on_device)
    assert (seen.uploads.total(), seen.downloads.total(), seen.waits.total()) == (0, 0, 0)
    assert torch.allclose(found.cpu(), inputs @ matrix.dequantize().t(), atol=1e-3)
    assert sum(one.launches for one in kernels) > 0


def test_auto_is_the_reference_where_a_device_has_no_kernel(pretend):
    there = operand(weight("row grid"), pretend)
    with pytest.warns(RuntimeWarning, match="there is no kernel for pretend"):
        assert kernel_name(choose_kernel("auto", there)) == "reference"


def test_gradients_reach_the_levels_on_the_device(pretend):
    """What training needs: dequantizing is differentiable in what codes stand for."""
    matrix = weight("column codebooks")
    gradients = []
    for device in ("cpu", pretend):
        plain = operand(matrix, device)
        parts = [replace(part, levels=part.levels.clone().requires_grad_()) for part in plain.parts]
        scales = plain.row_scales.clone().requires_grad_()
        trained = replace(plain, parts=tuple(parts), row_scales=scales)
        dense_rows(trained, 0, ROWS).square().sum().backward()
        gradients.append([part.levels.grad for part in parts] + [scales.grad])
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.device.type == pretend
        assert torch.allclose(ours, theirs.cpu(), rtol=1e-4)
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients[0])
