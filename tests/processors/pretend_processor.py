"""A pytest plugin that plays another processor: `-p pretend_processor`, with PRETEND=N to name it.

Processors differ in the last bits of sums, exponentials and random normals, for each adds in an
order of its own.  This moves such results by up to a unit of rounding of their summands, by a
pattern that N and the place in the tensor decide; what is exact stays exact, and the same
operation twice gives the same.  A test that fails here hangs on a last bit.  PRETEND_STRENGTH=16
moves float32 and float64 16 times as far, which finds small margins, and tolerances too close to
rounding.

Not reached: what numba, numpy and C compute, and other processes.  Tests that compare with another
process (the mark `other_process`) are skipped; one that compares with weights fixed in a file may
fail here without being at fault.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NUMBER = int(os.environ.get("PRETEND", "1"))
STRENGTH = float(os.environ.get("PRETEND_STRENGTH", "1"))
UNIT = {torch.float32: 2.0**-24 * STRENGTH, torch.float64: 2.0**-53 * STRENGTH}
HALVES = (torch.float16, torch.bfloat16)

aten = torch.ops.aten
PRODUCTS = {
    aten.mm,
    aten.addmm,
    aten.addmm_,
    aten.bmm,
    aten.baddbmm,
    aten.mv,
    aten.addmv,
    aten.dot,
}
SUMS = {aten.sum, aten.mean}
OTHERS = {
    aten._softmax,
    aten._log_softmax,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten.exp,
    aten.gelu,
    aten.linalg_cholesky_ex,
    aten.linalg_solve_triangular,
    aten.linalg_vector_norm,
    aten.logsumexp,
    aten.native_layer_norm,
    aten.normal_,
    aten.randn,
    aten.sigmoid,
    aten.silu,
    aten.var,
}


def directions(count: int) -> Tensor:
    """0, 1 or -1 for each place."""
    mixed = (torch.arange(count) + 1) * 2654435761 + NUMBER * 40503
    mixed = (mixed ^ (mixed >> 15)) * 2246822519
    mixed = (mixed ^ (mixed >> 13)) & 0xFFFF
    return (mixed % 4 == 0).double() - (mixed % 4 == 1).double()


def moved(result: Tensor, size: Tensor, exact: Tensor) -> Tensor:
    """Move what is not exact by a unit of rounding of `size`, and 16-bit numbers seldom."""
    move = directions(result.numel()).view(result.shape)
    if result.dtype in HALVES:
        seldom = torch.arange(result.numel()).view(result.shape) % 61 == NUMBER % 61
        move = torch.where(seldom, move * torch.finfo(result.dtype).eps, 0.0)
    else:
        move = move * UNIT[result.dtype]
    return torch.where(exact, result, (result.double() + move * size.double()).to(result.dtype))


def widened(value: Any, absolute: bool = False) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return abs(value) if absolute and isinstance(value, int | float) else value
    return value.double().abs() if absolute else value.double()


def product(packet: Any, func: Any, args: tuple, kwargs: dict) -> Any:
    name = packet._qualified_op_name.partition("::")[2].rstrip("_")
    factors = {key: value for key, value in kwargs.items() if key in ("alpha", "beta")}
    wide = getattr(aten, name)(*map(widened, args), **factors)
    factors = {key: abs(value) for key, value in factors.items()}
    size = getattr(aten, name)(*(widened(value, absolute=True) for value in args), **factors)
    result = func(*args, **kwargs)
    if result.dtype == torch.float64:  # whole numbers of some unit are taken for exact
        exact = wide * 1024 == (wide * 1024).round()
    else:
        exact = wide.to(result.dtype).double() == wide
    return result.copy_(moved(result, size, exact))


def other(func: Any, args: tuple, kwargs: dict, *, is_sum: bool) -> Any:
    """Move the result of an operation that is no product; weights of zero leave the bias exact."""
    results = func(*args, **kwargs)
    result = results[0] if isinstance(results, tuple) else results
    if movable(result):
        exact = (result == result.round()) | ~result.isfinite()
        if is_sum:
            exact = result * 1024 == (result * 1024).round()
        if func._overloadpacket is aten.native_layer_norm and args[2] is not None:
            exact = exact | (args[2] == 0)
        result.copy_(moved(result, 2 * result.abs(), exact))
    return results


def movable(value: Any) -> bool:
    on_cpu = isinstance(value, Tensor) and value.device.type == "cpu"
    return on_cpu and (value.dtype in UNIT or value.dtype in HALVES)


class PretendProcessor(TorchDispatchMode):
    """Sees every operation of a thread."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs, packet = kwargs or {}, func._overloadpacket
        if packet in PRODUCTS and "out" not in kwargs and movable(args[-1]):
            return product(packet, func, args, kwargs)
        if packet in SUMS or packet in OTHERS:
            return other(func, args, kwargs, is_sum=packet in SUMS)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # under inference mode nothing has taken it apart before
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


plain_run = threading.Thread.run


def run(thread: threading.Thread) -> None:
    """Modes are a thread's own."""
    with PretendProcessor():
        plain_run(thread)


threading.Thread.run = run  # type: ignore[method-assign]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skipped = pytest.mark.skip(reason="the other process is on the real processor")
    for item in items:
        if item.get_closest_marker("other_process"):
            item.add_marker(skipped)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[Any]:
    with PretendProcessor():
        return (yield)
