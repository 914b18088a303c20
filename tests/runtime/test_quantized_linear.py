"""A packed layer against its dense weight, through casts and copies; the choice of kernels."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_matrices import exact_product, operand, random_weight, rounding_bound

from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.payload.base import Payload
from claq_exp.runtime import kernels
from claq_exp.runtime.kernels import KERNEL, choose_kernel, kernel_name, self_check
from claq_exp.runtime.kernels.reference import REFERENCE, dense_rows
from claq_exp.runtime.linear import QuantizedLinear, use_kernel

FORMS = {
    "plain": {},
    "reserved": {"reserved": 0.1},
    "row_scales": {"row_scales": True, "reserved": 0.05},
    "shared": {"shared": True, "row_scales": True},
    "grid": {"group_size": 8},
}


def layer_of(weight: Payload, *, bias: bool = False, kernel: str = "auto"):
    layer = QuantizedLinear(weight.layout(), bias=bias, dtype=torch.float32, kernel=kernel)
    layer.load_state_dict(weight.pack(), strict=not bias)
    if bias:
        layer.bias.data.copy_(torch.arange(len(layer.bias)))
    return layer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 8, 49])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_reference_expands_the_very_same_numbers(form, rows, width):
    weight = random_weight(rows, 21, (width,), **FORMS[form])
    whole = weight.dequantize()
    read = operand(weight)
    chunks = [dense_rows(read, start, min(start + 16, rows)) for start in range(0, rows, 16)]
    assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.case(71)
@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    widths=st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True),
    reserved=st.sampled_from([0.0, 0.02, 0.3]),
    batch=st.integers(0, 4),
)
def test_any_mix_of_widths_multiplies(rows, columns, widths, reserved, batch):
    weight = random_weight(rows, columns, tuple(widths), reserved=reserved)
    inputs = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1))
    misses = (layer_of(weight)(inputs).double() - exact_product(weight, inputs)).abs()
    assert bool((misses <= rounding_bound(weight, inputs)).all())


@pytest.mark.case(71)
@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(30,), (1, 30), (2, 3, 30), (0, 30), (33, 30)])
def test_leading_dimensions_and_bias(kernel, shape):
    weight = random_weight(17, 30, (2, 4), reserved=0.1)
    layer = layer_of(weight, bias=True, kernel=kernel)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    expected = exact_product(weight, inputs.reshape(-1, 30)) + torch.arange(17)
    found = layer(inputs)
    assert found.shape == (*shape[:-1], 17)
    assert torch.allclose(found.double().reshape(-1, 17), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.case(71)
def test_views_that_are_not_contiguous():
    weight = random_weight(9, 12, (3,))
    inputs = torch.randn(12, 5, generator=torch.Generator().manual_seed(3)).t()
    misses = (layer_of(weight)(inputs).double() - exact_product(weight, inputs)).abs()
    assert bool((misses <= rounding_bound(weight, inputs)).all())


def test_the_reference_works_in_chunks_of_rows(monkeypatch):
    weight = random_weight(50, 20, (2, 3))
    inputs = torch.randn(4, 20)
    whole = REFERENCE.multiply(operand(weight), inputs)
    monkeypatch.setattr("claq_exp.runtime.kernels.reference.CHUNK", 160)
    parts = REFERENCE.multiply(operand(weight), inputs)
    assert torch.allclose(whole, parts, atol=1e-5)


@pytest.mark.case(69, 70)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_leave_what_is_stored_alone(dtype):
    weight = random_weight(16, 24, (2, 4), reserved=0.05, row_scales=True)
    layer = layer_of(weight, bias=True).to(dtype)
    assert layer.bias.dtype == dtype
    for suffix, tensor in weight.pack().items():
        assert torch.equal(layer.get_buffer(suffix), tensor), suffix
    assert layer(torch.ones(1, 24, dtype=dtype)).dtype == dtype


def test_numbers_that_change_in_place_are_noticed():
    first, second = (random_weight(16, 24, (3,), seed=seed) for seed in (0, 1))
    layer = layer_of(first)
    inputs = torch.randn(2, 24)
    before = layer(inputs)
    layer.load_state_dict(second.pack())
    assert not torch.allclose(before, layer(inputs))
    assert torch.allclose(layer(inputs), layer_of(second)(inputs))


@pytest.mark.case(70)
def test_copies_and_pickles_multiply_alike():
    layer = layer_of(random_weight(16, 24, (2, 4), reserved=0.05))
    inputs = torch.randn(2, 24)
    expected = layer(inputs)
    assert torch.equal(copy.deepcopy(layer)(inputs), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(inputs), expected)


def test_codes_are_not_copied_and_bytes_are_counted():
    weight = random_weight(256, 64, (2,))
    layer = layer_of(weight)
    assert layer.operand().parts[0].codes.data_ptr() == layer.codes_2.data_ptr()
    assert 64 * 64 + 64 * 4 * 2 <= layer.resident_bytes() < 64 * 64 + 64 * 4 * 8
    assert torch.equal(layer.dequantize(), weight.dequantize())
    assert "bits=2" in repr(layer)


def test_levels_beyond_float16_are_cut_off():
    weight = random_weight(8, 4, (1,), row_scales=True)
    weight.values.fill_(60000.0)
    read = operand(weight)
    assert read.clamps
    assert float(dense_rows(read, 0, 8).max()) == 65504.0
    inputs = torch.ones(1, 4)
    with pytest.warns(RuntimeWarning, match="does not cut weights off"):
        found = layer_of(weight)(inputs)
    assert torch.allclose(found.double(), exact_product(weight, inputs), rtol=1e-6)


@pytest.mark.case(66)
def test_damaged_tensors_are_refused():
    weight = random_weight(16, 24, (2, 4), reserved=0.05)
    stored = weight.pack()
    stored["codebooks_2"][0, 0] = float("nan")
    layer = QuantizedLinear(weight.layout(), bias=False, dtype=torch.float32)
    layer.load_state_dict(stored)
    with pytest.raises(CheckpointError, match="codebooks_2 holds a value that is not finite"):
        layer(torch.ones(1, 24))


def test_unknown_kernels_are_named():
    with pytest.raises(ConfigError, match=r"'fast'.*auto, cpu, reference, triton"):
        choose_kernel("fast", operand(random_weight(4, 4)))


class Wrong:
    """Multiplies by twice the matrix."""

    most_inputs = None

    def refusal(self, _):
        return None

    def multiply(self, read, inputs):
        return 2 * REFERENCE.multiply(read, inputs)


class Broken(Wrong):
    """Raises when it is used."""

    def multiply(self, *_):
        raise RuntimeError("illegal instruction")


@pytest.mark.parametrize(("kernel", "reason"), [(Wrong, "differ"), (Broken, "illegal instruction")])
def test_a_kernel_that_fails_its_check_is_never_chosen(monkeypatch, kernel, reason):
    monkeypatch.setattr(kernels, "_failures", {})
    monkeypatch.setitem(KERNEL, "cpu", kernel)
    read = operand(random_weight(2000, 16, (2, 4), reserved=0.05))
    with pytest.warns(RuntimeWarning, match=f"slow: .*{reason}.*kernel='dense'"):
        assert not isinstance(choose_kernel("auto", read), kernel)
    with pytest.raises(ConfigError, match=f"runtime.kernel=cpu: .*{reason}.*runtime.kernel=auto"):
        choose_kernel("cpu", read)


def test_the_check_sees_the_last_rows_too():
    class WrongAtTheEnd(Wrong):
        def multiply(self, read, inputs):
            product = REFERENCE.multiply(read, inputs)
            product[:, -1] += 1
            return product

    assert self_check(WrongAtTheEnd(), operand(random_weight(5000, 16))) is not None
    assert self_check(REFERENCE, operand(random_weight(5000, 16))) is None


def test_one_kernel_for_a_whole_model():
    model = torch.nn.Sequential(layer_of(random_weight(8, 8)), torch.nn.ReLU())
    assert use_kernel(model, "reference") == {"0": "reference"}
    assert use_kernel(model, "auto")["0"] in KERNEL
    assert kernel_name(REFERENCE) == "reference"
