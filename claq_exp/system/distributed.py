"""Several processes that quantize one model together, as torchrun starts them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from claq_exp.errors import ClaqError, telling_line
from claq_exp.system import interruption
from claq_exp.system.torchrun import Place, place

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # the others wait while the first measures; a dead one is noticed
PIECE = 2**22  # numbers that are summed at a time


class LostRankError(ClaqError):
    """Another process of the run is gone without a word."""


class Ranks:
    """The processes of a run, seen from one of them.

    All of them call the methods below `share` in the same order.  Where one has failed instead, its
    error is raised in the others; where one is gone, LostRankError.
    """

    def __init__(self, place: Place, device: str = "cpu") -> None:
        """Name a process' place among all.  device: where sums are taken."""
        self.rank, self.size = place.rank, place.size
        self.is_first = place.rank == 0
        self._device = device
        self._heard: BaseException | None = None

    def share(self, items: Sequence[T]) -> list[T]:
        """Return what of a list is this rank's: item i belongs to rank i % size."""
        return list(items[self.rank :: self.size])

    def number(self, item: int) -> int:
        """Return which of the whole list an item of this rank's share is."""
        return self.rank + item * self.size

    def any(self, flag: bool) -> bool:
        """Tell whether a rank says so."""
        if self.size == 1:
            return flag
        with interruption.held():
            return self._meet(flag=flag)

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)

    def tell(self, message: Any = None) -> Any:
        """Return the first rank's message, small Python data."""
        return self.broadcast(0, message)[0]

    def broadcast(
        self, owner: int, data: Any, tensors: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, Mapping[str, Tensor]]:
        """Return what `owner` gives: small Python data, and tensors on the CPU."""
        if self.size == 1:
            return data, tensors or {}
        with self._step():
            forms = {name: (t.shape, t.dtype) for name, t in (tensors or {}).items()}
            told = [(data, forms)]
            _call(dist.broadcast_object_list, told, owner)
            data, forms = told[0]
            given = {
                name: _bytes(tensors[name]) if tensors and owner == self.rank else _room(*form)
                for name, form in forms.items()
            }
            for content in given.values():
                _call(dist.broadcast, content, owner)
        return data, {n: given[n].view(dtype).view(shape) for n, (shape, dtype) in forms.items()}

    def sum_(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by its sum over all ranks, the same bytes on each.

        The order of summation depends on the number of ranks alone.
        """
        self._reduce(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by the largest of all ranks, entry by entry."""
        self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        if self.size == 1:
            return
        with self._step():
            for piece in tensor.view(-1).split(PIECE):
                there = piece.to(self._device)
                _call(dist.all_reduce, there, operation)
                if there is not piece:
                    piece.copy_(there)

    def in_order(self, own: Iterable[Tensor], count: int) -> Iterator[Tensor]:
        """Yield the tensors of all ranks on the first one, and nothing on the others.

        own: this rank's `share` of `count` tensors, made as they are asked for.
        """
        if self.size == 1:
            yield from own
            return
        tensors = iter(own)
        for start in range(0, count, self.size):
            mine = next(tensors, None)
            with self._step():
                found = self._collect(mine, min(self.size, count - start))
            yield from found

    def fail(self, error: BaseException) -> bool:
        """Tell the others of an error of this rank; return whether they know of it now."""
        if error is self._heard:
            return True
        try:
            with interruption.held():
                self._meet(error=error)
        except LostRankError:
            return False
        return True

    def _collect(self, mine: Tensor | None, givers: int) -> list[Tensor]:
        forms: list[Any] = [None] * self.size
        _call(dist.all_gather_object, forms, None if mine is None else (mine.shape, mine.dtype))
        if not self.is_first:
            if mine is not None:
                _call(dist.send, _bytes(mine), 0)
            return []
        assert mine is not None
        found = [mine]
        for rank, (shape, dtype) in enumerate(forms[1:givers], start=1):
            content = _room(shape, dtype)
            _call(dist.recv, content, rank)
            found.append(content.view(dtype).view(shape))
        return found

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        """Do together what follows, once it is known that all ranks are well."""
        with interruption.held():
            self._meet()
            yield

    def _meet(self, *, error: BaseException | None = None, flag: bool = False) -> bool:
        state = torch.tensor([error is not None, flag], dtype=torch.uint8)
        _call(dist.all_reduce, state, dist.ReduceOp.MAX)
        failed, flagged = map(bool, state.tolist())
        if failed:
            told: list[Any] = [None] * self.size
            _call(dist.all_gather_object, told, None if error is None else _described(error))
            if error is None:
                rank, (kind, message) = next((r, t) for r, t in enumerate(told) if t is not None)
                self._heard = kind(f"{message} (rank {rank})" if message else "")
                raise self._heard
        return flagged


ALONE = Ranks(Place())


@contextlib.contextmanager
def together() -> Iterator[Ranks]:
    """Join the processes that torchrun started, and end with them.

    Where one fails, the first says why; the others exit with the same code, in silence but for
    what is a fault of the program.
    """
    here = place()
    if here.size == 1:
        yield ALONE
        return
    device, backend = _transport(here)
    dist.init_process_group(backend, timeout=PATIENCE)
    ranks = Ranks(here, device)
    try:
        yield ranks
    except BaseException as error:
        told = ranks.fail(error) or isinstance(error, LostRankError)
        expected = isinstance(error, ClaqError | OSError | KeyboardInterrupt)
        if told and expected and not ranks.is_first:
            raise SystemExit(_exit_code(error)) from error
        raise
    finally:
        dist.destroy_process_group()


def _transport(here: Place) -> tuple[str, str]:
    """Return where a rank's sums are taken, and what carries them: the same kind on all ranks."""
    if torch.cuda.device_count() < here.local_size:
        return "cpu", "gloo"
    return f"cuda:{here.local_rank}", "cpu:gloo,cuda:nccl"


def owners(weights: Mapping[str, int], size: int) -> dict[str, int]:
    """Divide pieces of work over ranks: the largest first, each to the rank with least so far."""
    loads = [0] * size
    found = {}
    for name in sorted(weights, key=lambda name: -weights[name]):  # stable: ties keep their order
        found[name] = loads.index(min(loads))
        loads[found[name]] += weights[name]
    return found


def _call(operation: Callable[..., Any], *arguments: Any) -> None:
    try:
        operation(*arguments)
    except RuntimeError as error:
        raise LostRankError(
            "another process of this run has ended without a word (killed, or out of memory?); "
            "the same command goes on where this one stopped"
        ) from error


def _described(error: BaseException) -> tuple[type[BaseException], str]:
    if isinstance(error, KeyboardInterrupt):
        return interruption.Interrupted, ""
    if isinstance(error, ClaqError):
        return type(error), str(error)
    return ClaqError, f"{type(error).__name__}: {telling_line(error)}"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return interruption.EXIT_CODE
    return getattr(error, "exit_code", ClaqError.exit_code)


def _bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's content as bytes on the CPU, of which every backend knows the type."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _room(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
