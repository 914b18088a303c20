"""What every stored form of a matrix must do; a new one needs a sample in payload_samples.py."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from damages import limits
from payload_samples import SAMPLES
from torch import Tensor

from claq_exp.errors import CheckpointError, ConfigError, NumericalError
from claq_exp.payload import (
    PAYLOAD,
    operand_of,
    read_layout,
    reserved_counts,
    unpack_weight,
)
from claq_exp.payload.base import Payload
from claq_exp.payload.stored import STORED_DTYPES, Ledger
from claq_exp.runtime.kernels import choose_kernel, kernel_name
from claq_exp.runtime.kernels.reference import dense_rows

every_sample = pytest.mark.parametrize("payload", SAMPLES.values(), ids=SAMPLES)


def through_disk(payload: Payload) -> Payload:
    layout = read_layout(json.loads(json.dumps(payload.layout().to_json())))
    return unpack_weight(layout, payload.pack())


def assert_same_bytes(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    for suffix, tensor in first.items():
        assert tensor.dtype == second[suffix].dtype, suffix
        assert tensor.numpy().tobytes() == second[suffix].numpy().tobytes(), suffix


def test_there_is_a_sample_of_every_kind():
    assert {payload.kind for payload in SAMPLES.values()} == set(PAYLOAD)
    assert all(PAYLOAD[payload.kind] is type(payload) for payload in SAMPLES.values())
    assert all(kind == member.layout_class.kind for kind, member in PAYLOAD.items())


@every_sample
def test_what_is_packed_is_what_the_layout_says_and_the_ledger_counts_it(payload):
    layout, tensors = payload.layout(), payload.pack()
    described = layout.stored_tensors()
    assert set(tensors) == set(described)
    accounts = dict.fromkeys(Ledger().as_dict(), 0)
    for suffix, spec in described.items():
        assert tuple(tensors[suffix].shape) == spec.shape, suffix
        assert tensors[suffix].dtype == STORED_DTYPES[spec.dtype], suffix
        assert spec.bits == 8 * tensors[suffix].nbytes, suffix
        accounts[spec.account] += spec.bits
    assert payload.ledger().as_dict() == accounts
    assert sum(layout.widths().values()) == layout.columns
    assert payload.shape == (layout.rows, layout.columns)
    assert layout.describe()


@every_sample
def test_a_matrix_comes_back_bit_by_bit(payload):
    again = through_disk(payload)
    assert type(again) is type(payload)
    assert again.layout() == payload.layout()
    assert torch.equal(again.dequantize(), payload.dequantize())
    assert_same_bytes(again.pack(), payload.pack())
    counts = reserved_counts(payload.layout(), payload.pack())
    assert counts.shape == (payload.layout().columns,)
    assert int(counts.sum()) == payload.layout().reserved


@every_sample
@pytest.mark.filterwarnings("ignore:a packed layer is dequantized")
@pytest.mark.parametrize("name", ["auto", "reference", "cpu", "triton"])
def test_every_kernel_takes_it_or_says_in_one_line_that_it_does_not(payload, name):
    if name == "triton":
        pytest.importorskip("triton")
    operand = operand_of(payload.layout(), payload.pack())
    try:
        kernel = choose_kernel(name, operand)
    except ConfigError as error:
        assert name in ("cpu", "triton")
        assert operand.decoder is not None or "compiler" in str(error)
        assert "\n" not in str(error)
        return
    assert (operand.decoder is None) or kernel_name(kernel) == "reference"
    inputs = torch.randn(3, payload.shape[1], generator=torch.Generator().manual_seed(0))
    found = kernel.multiply(operand, inputs)
    exact = inputs.double() @ payload.dequantize().double().t()
    assert torch.allclose(found.double(), exact, atol=1e-4, rtol=1e-4)
    assert torch.equal(dense_rows(operand, 0, payload.shape[0]), payload.dequantize())


@every_sample
def test_the_gradient_is_that_of_finite_differences_in_float64(payload):
    leaves = payload.trainable()
    assert leaves
    assert all(leaf.is_floating_point() for leaf in leaves.values())
    assert ("reserved_values" in leaves) == (payload.layout().reserved > 0)

    def dense(*values: Tensor) -> Tensor:
        return payload.with_values(dict(zip(leaves, values, strict=True))).dequantize()

    doubles = [leaf.double().requires_grad_() for leaf in leaves.values()]
    assert dense(*doubles).dtype == torch.float64
    assert torch.allclose(dense(*doubles).float(), payload.dequantize(), rtol=1e-5)
    assert torch.autograd.gradcheck(dense, doubles)
    for name, leaf in leaves.items():  # one alone, beside others that stay float32
        alone = leaf.double().requires_grad_()
        payload.with_values({name: alone}).dequantize().sum().backward()
        assert float(alone.grad.abs().sum()) > 0, name


@every_sample
def test_numbers_and_gradients_have_the_same_bits_every_time(payload):
    def once(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        leaves = {name: leaf.float().requires_grad_() for name, leaf in payload.trainable().items()}
        dense = payload.with_values(leaves).dequantize()
        dense.square().sum().backward()
        return [dense.detach(), *(leaf.grad for leaf in leaves.values())]

    before = torch.get_num_threads()
    try:
        runs = [once(threads) for threads in (1, 2, 2, 1)]
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


@every_sample
def test_what_is_rebuilt_is_what_is_stored(payload):
    same = payload.rebuilt(payload.trainable())
    assert_same_bytes(same.pack(), payload.pack())
    dice = torch.Generator().manual_seed(1)
    moved = {
        name: leaf.float() * (1 + 0.3 * torch.randn(leaf.shape, generator=dice))
        for name, leaf in payload.trainable().items()
    }
    rebuilt = payload.rebuilt(moved)
    assert torch.equal(through_disk(rebuilt).dequantize(), rebuilt.dequantize())
    assert not torch.equal(rebuilt.dequantize(), payload.dequantize())
    assert rebuilt.layout() == payload.layout()


@every_sample
def test_a_leaf_that_is_not_there_and_a_number_that_cannot_be_stored_are_refused(payload):
    with pytest.raises(KeyError, match="galaxy"):
        payload.with_values({"galaxy": torch.zeros(1)})
    for name, leaf in payload.trainable().items():
        for bad in (float("nan"), float("inf")):
            with pytest.raises(NumericalError):
                payload.rebuilt({name: torch.full_like(leaf, bad, dtype=torch.float32)})
    assert payload.finite()


@every_sample
def test_a_matrix_is_dequantized_on_its_device(payload, pretend):
    there = payload.to(pretend)
    dense = there.dequantize()
    assert dense.device.type == pretend
    assert torch.equal(dense.cpu(), payload.dequantize())
    assert torch.equal(there.to("cpu").dequantize(), payload.dequantize())


HUGE: dict[str, Callable[[dict], None]] = {
    "rows": lambda data: data.update(rows=2**40),
    "most rows": lambda data: data.update(rows=2**47, columns=1),
    "columns": lambda data: data.update(columns=2**40),
    "beyond all": lambda data: data.update(rows=2**200),
    "columns and widths": lambda data: data.update(columns=2**40, columns_per_width={"1": 2**40}),
    "reserved": lambda data: data.update(rows=2**30, reserved=2**40, most_reserved=2**30),
    "group": lambda data: data.update(group_size=2**60),
}


@pytest.mark.case(73)
@every_sample
@pytest.mark.parametrize("what", HUGE)
def test_huge_sizes_are_refused_before_memory_is_taken(payload, what):
    data = payload.layout().to_json()
    known = set(data)
    HUGE[what](data)
    data = {key: value for key, value in data.items() if key in known}
    if data == payload.layout().to_json():
        return
    for use in (unpack_weight, operand_of, reserved_counts):
        with limits(), pytest.raises(CheckpointError):
            use(read_layout(data), payload.pack())


@pytest.mark.parametrize("name", ["lo_bcq", "lo_bcq, inverse"])
def test_codewords_in_another_order_are_sorted_and_the_codes_with_them(name):
    payload = SAMPLES[name]
    turned = {"codewords": payload.trainable()["codewords"].flip(1)}
    rebuilt = payload.rebuilt(turned)
    assert bool((rebuilt.trainable()["codewords"].diff(dim=1) >= 0).all())
    assert torch.equal(rebuilt.dequantize(), payload.with_values(turned).dequantize())


@pytest.mark.parametrize("name", ["lo_bcq", "lo_bcq, inverse", "mxfp4", "nvfp4", "vsq"])
def test_a_step_becomes_the_nearest_that_is_stored(name):
    payload = SAMPLES[name]
    form = payload.layout().block_format
    dice = torch.Generator().manual_seed(2)
    steps = payload.trainable()["steps"]
    asked = steps * (0.2 + 0.8 * torch.rand(steps.shape, generator=dice))
    blocks = payload.rebuilt({"steps": asked}).blocks
    limits = torch.zeros(1) if blocks.limits is None else blocks.limits
    known = form.rule.read(torch.arange(256, dtype=torch.uint8)[None], limits[:, None], form.top)
    known = torch.where(torch.isfinite(known) & (known >= 0), known, torch.inf)
    for row, line in enumerate(asked):
        choices = known[row if len(known) > 1 else 0]
        best = (line[:, None] - choices).abs().min(dim=1).values
        assert torch.allclose((line - blocks.steps[row]).abs(), best, rtol=1e-5, atol=1e-9)
