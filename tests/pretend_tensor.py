"""The tensors of the pretended device and what its operators do, see `pretend_device`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from pretend_state import NAME, Address, Allocation, State, where
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
MIXED = "Expected all tensors to be on the same device"  # CUDA's words
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
    allocation: Allocation

    @staticmethod
    def __new__(cls, raw: Tensor, device: torch.device, allocation: Allocation) -> PretendTensor:
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
        return compute(func, args, kwargs or {})

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


def compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
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
    for watcher in State.watchers:
        if target.type == "cpu":
            watcher.downloads[where()] += 1
            watcher.bytes_down += size
        else:
            watcher.uploads[where()] += 1
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
        for watcher in State.watchers:
            watcher.uploads[where()] += len(indices)
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
        for watcher in State.watchers:
            watcher.waits[where()] += 1


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
        tensor.allocation = Allocation(size)
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
            allocation = Allocation(storage.nbytes())
        return PretendTensor(leaf, target, allocation)

    with torch.inference_mode(inference):
        return tree_map(wrap, part)
