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

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, total_ordering
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
CPU = torch.device("cpu")
MIXED = "Expected all tensors to be on the same device"  # CUDA's words
PROJECT = Path(__file__).parents[1]
aten = torch.ops.aten

COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
INDEXED = {  # operator: the place of its indices
    aten.index.Tensor: 1,
    aten._unsafe_index.Tensor: 1,
    aten.index_put.default: 1,
    aten.index_put_.default: 1,
    aten._index_put_impl_.default: 1,
    aten._unsafe_index_put.default: 1,
}
SCALARS = {  # beside pointwise operators: these take a CPU tensor of no dimensions as a number
    aten.fill_.Tensor,
    aten.fill.Tensor,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.where.self,
    *INDEXED,
}
WAITS = {  # their result, or its shape, is read on the host
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
DIRECT = (  # `torch.tensor` calls these behind the back of a tensor's own type
    "copy_",
    "_to_copy",
    "lift_fresh",
    "detach",
    "alias",
)


@dataclass
class Traffic:
    """What went between host and device.  Each counter has the line of the project that asked."""

    uploads: Counter[str] = field(default_factory=Counter)
    downloads: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    bytes_up: int = 0
    bytes_down: int = 0

    def total(self, kind: str) -> int:
        """Return how many there were of uploads, downloads or waits."""
        return getattr(self, kind).total()


class _State:
    """What the one pretended machine holds."""

    available = False
    allocated = 0
    peak = 0
    limit = 1 << 34
    watchers: list[Traffic] = []  # noqa: RUF012


class _Allocation:
    """Memory of the device, as long as a tensor uses it."""

    def __init__(self, size: int) -> None:
        self.size = size
        if _State.allocated + size > _State.limit:
            self.size = 0
            raise torch.OutOfMemoryError(
                f"{NAME} out of memory. Tried to allocate {size} bytes, of which "
                f"{_State.limit - _State.allocated} are free"
            )
        _State.allocated += size
        _State.peak = max(_State.peak, _State.allocated)

    def __del__(self, state: type[_State] = _State) -> None:
        state.allocated -= self.size


@total_ordering
class Address:
    """Where a tensor lies in the device's memory: no number, for nothing on the CPU may read it."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __add__(self, count: int) -> Address:
        return Address(self._address + count)

    def __lt__(self, other: Address) -> bool:
        return self._address < other._address

    def __mod__(self, by: int) -> int:
        return self._address % by

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and other._address == self._address

    def __hash__(self) -> int:
        return hash(self._address)

    def __index__(self) -> int:
        raise RuntimeError(f"an address on {NAME} cannot be read by code that runs on the CPU")

    __int__ = __index__


class _Storage:
    """The memory of a tensor, as far as it is asked for."""

    def __init__(self, tensor: PretendTensor) -> None:
        self.device, self._own = tensor.device, tensor.raw.untyped_storage()

    def data_ptr(self) -> Address:
        return Address(self._own.data_ptr())

    def nbytes(self) -> int:
        return self._own.nbytes()

    size = __len__ = nbytes


class PretendTensor(Tensor):
    """A tensor on the device.  raw: its numbers, an ordinary tensor."""

    raw: Tensor
    allocation: _Allocation

    @staticmethod
    def __new__(cls, raw: Tensor, device: torch.device, allocation: _Allocation) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=device,
        )
        made.raw, made.allocation = raw, allocation
        return made

    def __init__(self, *_: object) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, PretendTensor):
            raise RuntimeError(f"data of {self.device} cannot be replaced by that of the CPU")
        Tensor.data.__set__(self, other)
        self.raw, self.allocation = other.raw, other.allocation

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as for every tensor of a device."""
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy "
            "the tensor to host memory first."
        )

    def data_ptr(self) -> Any:
        """Return an address that only a device can read."""
        return Address(self.raw.data_ptr())

    def untyped_storage(self) -> Any:
        """Return what is asked of a storage to tell tensors with the same memory from others."""
        return _Storage(self)

    def tolist(self) -> Any:
        """Return the numbers; the host waits for them."""
        return self.detach().cpu().tolist()

    def __format__(self, form: str) -> str:
        return self.item().__format__(form) if self.dim() == 0 else repr(self)

    def __repr__(self, *, tensor_contents: str | None = None) -> str:
        return f"{self.raw!r} on {self.device}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self.detach().cpu(), str(self.device), self.requires_grad)


def _unpickled(raw: Tensor, device: str, requires_grad: bool) -> Tensor:
    return raw.to(device).requires_grad_(requires_grad)


def _compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operator of which an operand or the result is on the device."""
    if _in_parts(func):  # in inference mode autograd has not taken it apart
        return func.decompose(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    own = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    wanted = kwargs.get("device")
    device = own[0].device if own else _indexed(wanted)
    if func in COPIES:
        target = _copied(func, args, kwargs, device)
    else:
        target = device
        _check_devices(func, args, tensors, own)
        _check_generator(kwargs.get("generator"), args)
        if wanted is not None and own:  # torch.zeros_like(tensor, device="cpu")
            target = _indexed(wanted) if wanted.type == NAME else wanted
    _note_waits(func, args)
    with torch.inference_mode(False), torch.no_grad():
        raw = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    return _results(func, args, kwargs, raw, target)


@cache
def _in_parts(func: Any) -> bool:
    """Tell whether an operator is made of others, which say what it does on a device."""
    implicit = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), implicit)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, PretendTensor):
        return value.raw
    if isinstance(value, torch.device) and value.type == NAME:
        return CPU
    return value


def _indexed(device: torch.device) -> torch.device:
    return torch.device(NAME, device.index or 0)


def _copied(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device
) -> torch.device:
    """Count a copy, and return where its result lies."""
    if func is aten._to_copy.default:
        source, target = args[0], kwargs.get("device") or args[0].device
    else:  # copy_(target, source), _copy_from(source, target)
        place = 1 if func is aten.copy_.default else 0
        source, target = args[place], args[1 - place].device
    if target.type == source.device.type:
        return target if target.type == "cpu" else device
    size = source.numel() * source.element_size()
    for watcher in _State.watchers:
        if target.type == "cpu":
            watcher.downloads[_where()] += 1
            watcher.bytes_down += size
        else:
            watcher.uploads[_where()] += 1
            watcher.bytes_up += size
    return target if target.type == "cpu" else _indexed(target)


def _check_devices(
    func: Any, args: Sequence[Any], tensors: Sequence[Tensor], own: Sequence[Tensor]
) -> None:
    """Raise RuntimeError where operands lie on several devices and CUDA would not take them."""
    others = {id(tensor) for tensor in tensors if not isinstance(tensor, PretendTensor)}
    if len({tensor.device for tensor in own}) > 1:
        names = " and ".join(sorted({str(tensor.device) for tensor in own}))
        raise RuntimeError(f"{MIXED}, but found at least two devices, {names}!")
    if not others or not own:
        return
    if func in INDEXED:
        if not isinstance(args[0], PretendTensor):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        indices = [index for index in args[INDEXED[func]] if id(index) in others]
        for watcher in _State.watchers:
            watcher.uploads[_where()] += len(indices)
        others -= {id(index) for index in indices}
    numbers = func in SCALARS or torch.Tag.pointwise in func.tags
    for tensor in tensors:
        if id(tensor) in others and not (numbers and tensor.dim() == 0):
            raise RuntimeError(
                f"{MIXED}, but found at least two devices, "
                f"{own[0].device} and {tensor.device}! (when running {func})"
            )


def _check_generator(generator: torch.Generator | None, args: Sequence[Any]) -> None:
    found = [generator, *(arg for arg in args if isinstance(arg, torch.Generator))]
    for one in found:
        if one is not None and one.device.type != NAME:
            raise RuntimeError(
                f"Expected a '{NAME}' device type for generator but found '{one.device.type}'"
            )


def _note_waits(func: Any, args: Sequence[Any]) -> None:
    masks = func in INDEXED and any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        for index in args[INDEXED[func]]
    )
    if masks or func in WAITS:
        for watcher in _State.watchers:
            watcher.waits[_where()] += 1


def _where() -> str:
    """Return the line of the project that is running."""
    own = [
        frame
        for frame in traceback.extract_stack()
        if frame.filename.startswith(str(PROJECT)) and frame.filename != __file__
    ]
    if not own:
        return "?"
    return f"{Path(own[-1].filename).relative_to(PROJECT)}:{own[-1].lineno}"


@cache
def _aliases(func: Any) -> tuple[tuple[tuple[str, ...], bool], ...]:
    """Return, for each result, the aliases of its schema, and whether it is written to."""
    return tuple(
        (tuple(one.alias_info.before_set), one.alias_info.is_write)
        if one.alias_info is not None
        else ((), False)
        for one in func._schema.returns
    )


def _results(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], raw: Any, target: torch.device
) -> Any:
    """Return the tensors that were written to themselves, and the others as tensors of a device."""
    returned = _aliases(func)
    several = isinstance(raw, tuple) and len(returned) > 1
    parts = raw if several else (raw,)
    results = []
    for part, (aliases, written) in zip(parts, returned, strict=False):
        if written:
            results.append(_argument(func, args, kwargs, aliases))
        else:
            results.append(_wrapped(part, target, args, kwargs, view=bool(aliases)))
    if not returned:
        return None
    return tuple(results) if several else results[0]


def _argument(func: Any, args: Sequence[Any], kwargs: dict[str, Any], aliases: Any) -> Any:
    for place, argument in enumerate(func._schema.arguments):
        info = argument.alias_info
        if info is not None and info.is_write and set(info.before_set) & set(aliases):
            found = args[place] if place < len(args) else kwargs[argument.name]
            if isinstance(found, PretendTensor):
                _settle(found)
            return found
    raise AssertionError(f"{func} returns what it did not get")


def _settle(tensor: PretendTensor) -> None:
    """Give a tensor that was written to the shape and the memory that it has now."""
    raw = tensor.raw
    size = raw.untyped_storage().nbytes()
    if size > tensor.allocation.size:
        tensor.allocation = _Allocation(size)
    if tensor.size() != raw.size() or tensor.stride() != raw.stride():
        with torch.inference_mode(tensor.is_inference()):
            shaped = PretendTensor(raw, tensor.device, tensor.allocation)
            Tensor.data.__set__(tensor, shaped)


def _wrapped(
    part: Any, target: torch.device, args: Sequence[Any], kwargs: dict[str, Any], *, view: bool
) -> Any:
    """Make results tensors of the device.

    A view of a tensor that inference mode did not make is one that it did not make either.
    """
    if target.type != NAME or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(part)):
        return part
    own = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, PretendTensor)]
    held = {one.raw.untyped_storage().data_ptr(): one.allocation for one in own}
    inference = own[0].is_inference() if view and own else torch.is_inference_mode_enabled()

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        storage = leaf.untyped_storage()
        allocation = held.get(storage.data_ptr()) if storage.nbytes() else None
        if allocation is None:
            allocation = _Allocation(storage.nbytes())
        return PretendTensor(leaf, target, allocation)

    with torch.inference_mode(inference):
        return tree_map(wrap, part)


class _Module:
    """`torch.pretend`: the functions that `torch.cuda` has too."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return _State.available

    def device_count(self) -> int:
        return int(_State.available)

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
        for watcher in _State.watchers:
            watcher.waits[_where()] += 1

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return _State.limit - _State.allocated, _State.limit

    def memory_allocated(self, device: Any = None) -> int:
        return _State.allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return _State.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        _State.peak = _State.allocated

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
            return _State.available

        def has_primary_context(self, _: int) -> bool:
            return _State.available

        def is_built(self) -> bool:
            return True

    _setup_privateuseone_for_python_backend(NAME, _Module(), Hook())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _compute(func, args, kwargs), "PrivateUse1")
    _KEPT.append(library)
    factories = torch.library.Library("aten", "IMPL")
    for name in DIRECT:
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")
        factories.impl(
            name, lambda *args, func=func, **kwargs: _compute(func, args, kwargs), "PrivateUse1"
        )
    _KEPT.append(factories)


_KEPT: list[Any] = []


@contextmanager
def in_use() -> Iterator[str]:
    """Have the device there, as long as this is open."""
    install()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter stays the same object
    _State.available = True
    try:
        yield NAME
    finally:
        _State.available = False
        torch.__future__.set_swap_module_params_on_conversion(swaps)


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what goes between host and device, as long as this is open."""
    seen = Traffic()
    _State.watchers.append(seen)
    try:
        yield seen
    finally:
        _State.watchers.remove(seen)


@contextmanager
def memory(limit: int) -> Iterator[None]:
    """Let the device have so many bytes beside those that are in use now."""
    before, _State.limit = _State.limit, _State.allocated + limit
    _State.peak = _State.allocated
    try:
        yield
    finally:
        _State.limit = before


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
