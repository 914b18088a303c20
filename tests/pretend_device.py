"""A device that is none: tensors that lie on `pretend:0`, compute on the CPU, and refuse to mix.

It is a backend of PyTorch (PrivateUse1) in Python, and stands in for a GPU where there is none:

- `tensor.device`, `torch.zeros(..., device="pretend")`, `.to("pretend")` and `module.to("pretend")`
  say and do what they would with `cuda`; views, in-place operators and autograd work.
- Operands on different devices raise the RuntimeError that CUDA raises.  As there, a CPU tensor of
  no dimensions takes part in pointwise operators, and indices may lie on the CPU.
- `.numpy()`, a generator of the CPU, and the use of `.data_ptr()` by code that runs on the CPU are
  refused.
- Every copy between host and device, and every operator for whose result CUDA makes the host wait
  (`item`, `nonzero`, an index of bools, ...), is counted: `with traffic() as seen: ...`.
- Its memory is counted, and can be limited: `with memory(limit): ...` raises OutOfMemoryError.

Triton's interpreter computes on what `on_host` returns: `interpreted(kernel)` hands it over, and
refuses tensors of the CPU as a GPU would.

What it does not do: streams and graphs, generators of its own, memory that is pinned, types that a
GPU lacks, and other rounding than the CPU's.  Everything is done at once, so that an error of
ordering stays hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from pretend_state import NAME, State, Traffic, where
from pretend_tensor import PretendTensor, compute
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten
DIRECT = (  # `torch.tensor` calls these behind the back of a tensor's own type
    "copy_",
    "_to_copy",
    "lift_fresh",
    "detach",
    "alias",
)


class _Module:
    """`torch.pretend`: the functions that `torch.cuda` has too."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return State.available

    def device_count(self) -> int:
        return int(State.available)

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_device_name(self, device: Any = None) -> str:
        return "Pretended device"

    def synchronize(self, device: Any = None) -> None:
        for watcher in State.watchers:
            watcher.waits[where()] += 1

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return State.limit - State.allocated, State.limit

    def memory_allocated(self, device: Any = None) -> int:
        return State.allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return State.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        State.peak = State.allocated

    def empty_cache(self) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


@cache
def install() -> None:
    """Teach PyTorch the device, once in a process; it stays there, and hides when not in use."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    class Hook(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return State.available

        def has_primary_context(self, _: int) -> bool:
            return State.available

        def is_built(self) -> bool:
            return True

    _setup_privateuseone_for_python_backend(NAME, _Module(), Hook())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: compute(func, args, kwargs), "PrivateUse1")
    _KEPT.append(library)
    factories = torch.library.Library("aten", "IMPL")
    for name in DIRECT:
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")
        factories.impl(
            name, lambda *args, func=func, **kwargs: compute(func, args, kwargs), "PrivateUse1"
        )
    _KEPT.append(factories)


_KEPT: list[Any] = []


@contextmanager
def in_use() -> Iterator[str]:
    """Have the device there, as long as this is open."""
    install()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter stays the same object
    State.available = True
    try:
        yield NAME
    finally:
        State.available = False
        torch.__future__.set_swap_module_params_on_conversion(swaps)


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what goes between host and device, as long as this is open."""
    seen = Traffic()
    State.watchers.append(seen)
    try:
        yield seen
    finally:
        State.watchers.remove(seen)


@contextmanager
def memory(limit: int) -> Iterator[None]:
    """Let the device have so many bytes beside those that are in use now."""
    before, State.limit = State.limit, State.allocated + limit
    State.peak = State.allocated
    try:
        yield
    finally:
        State.limit = before


def on_host(value: Any) -> Any:
    """Return the numbers of a tensor of the device, not a copy; anything else as it is."""
    return value.raw if isinstance(value, PretendTensor) else value


class interpreted:
    """A Triton kernel that is run by the interpreter, on tensors of the device alone."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.launches = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and not isinstance(value, PretendTensor):
                    raise ValueError(
                        "Pointer argument cannot be accessed from Triton (cpu tensor?)"
                    )
            self.launches += 1
            self._kernel[grid](*map(on_host, args), **tree_map(on_host, kwargs))

        return launch
