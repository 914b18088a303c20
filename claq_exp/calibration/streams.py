"""The hidden states that flow through a model block by block, and are kept between two blocks.

There are two streams: `student` holds what comes of the quantized blocks, `teacher` what comes of
the original ones.  A run has those that its strategies want; both are kept in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from claq_exp.checkpoint.store import BlockStore
from claq_exp.errors import CalibrationError
from claq_exp.quantize.moments import CROSS
from claq_exp.system.distributed import ALONE, Ranks

STUDENT, TEACHER = "student", "teacher"


def streams_for(wants: Iterable[str]) -> tuple[str, ...]:
    """Return the streams of a run whose strategies want these things.

    wants: of the rule that trains blocks, and of the solver.
    """
    return (STUDENT,) if {TEACHER, CROSS}.isdisjoint(wants) else (STUDENT, TEACHER)


@dataclass(frozen=True)
class HiddenForm:
    """How hidden states are kept between blocks.

    dtype: None for that of the forward passes.  on_disk: read them from the store's file.
    """

    dtype: torch.dtype | None = None
    on_disk: bool = False

    def cast(self, hidden: Tensor, index: int) -> Tensor:
        """Return what enters block `index` as it is kept.

        Raises CalibrationError when a value does not fit the type.
        """
        cast = hidden.to(self.dtype or hidden.dtype)
        if cast.dtype != hidden.dtype and not torch.isfinite(cast).all():
            raise CalibrationError(
                f"hidden states up to {hidden.abs().max().item():.3g} enter block {index}, beyond "
                f"{self.dtype}; set calibration.keep_in=bfloat16 or float32"
            )
        return cast


AS_COMPUTED = HiddenForm()


class Streams:
    """This rank's batches of each stream: what enters the block at hand, and what leaves it.

    Every rank goes through the same calls.  Of a block, `keep` what leaves it in each stream, then
    `advance`: from there on a kill costs nothing before the next block.
    """

    def __init__(
        self,
        names: Sequence[str],
        batches: list[Tensor],
        store: BlockStore,
        form: HiddenForm = AS_COMPUTED,
        ranks: Ranks = ALONE,
    ) -> None:
        """Name the streams.  batches: token ids [batch, seqlen] of all ranks.  store: open."""
        self.names = tuple(names)
        self._batches, self._store, self._form, self._ranks = batches, store, form, ranks
        self._entering: dict[str, Sequence[Tensor]] = {}
        self._leaving: dict[str, Sequence[Tensor]] = {}

    @property
    def block(self) -> int:
        """Number of the block at hand; those before it are finished."""
        return self._store.blocks

    def start(
        self, first: Callable[[str, list[Tensor]], Iterable[Tensor]], device: torch.device
    ) -> None:
        """Take up what the store holds, or else what enters the first block.

        first: returns that of a stream, [batch, seqlen, width] of each of the batches of token ids
        given to it.
        device: where hidden states in memory lie.
        """
        stored = {name: self._store.hidden(name) for name in self.names}
        if any(states is None for states in stored.values()):
            for name in self.names:
                self._keep(name, first(name, self._ranks.share(self._batches)), 0)
            self._store.begin_block(0)
            self._meet()
            return
        for name, states in stored.items():
            own = self._own(states or ())
            kept = own if self._form.on_disk else [hidden.to(device) for hidden in own]
            self._entering[name] = kept

    def entering(self, name: str) -> Sequence[Tensor]:
        """Return what enters the block at hand; a list is in memory, and may be used up."""
        return self._entering[name]

    def leaving(self, name: str) -> Sequence[Tensor]:
        """Return what was kept of what leaves the block at hand."""
        return self._leaving[name]

    def keep(self, name: str, made: Iterable[Tensor]) -> None:
        """Keep what leaves the block at hand: [batch, seqlen, width] of this rank's batches.

        Raises CalibrationError when a value does not fit the type that hidden states are kept in.
        """
        self._keep(name, made, self.block + 1)

    def advance(self) -> None:
        """Have the block at hand finished: what left it enters the next."""
        self._store.begin_block(self.block + 1)
        self._meet()

    def _meet(self) -> None:
        self._ranks.wait()  # for what the first has published
        self._entering, self._leaving = self._leaving, {}

    def _keep(self, name: str, made: Iterable[Tensor], index: int) -> None:
        kept: list[Tensor] = []

        def noted() -> Iterator[Tensor]:
            for hidden in made:
                cast = self._form.cast(hidden, index)
                if not self._form.on_disk:
                    kept.append(cast)
                yield cast

        states = self._ranks.in_order(noted(), len(self._batches))
        first = next(states, None)  # there is none on other ranks than the first
        like = {
            str(number): first.new_empty(*batch.shape, first.shape[-1], device="meta")
            for number, batch in enumerate(self._batches)
            if first is not None
        }
        whole = chain(() if first is None else (first,), states)
        stored = self._store.keep_hidden(name, index, whole, like)
        if self._form.on_disk:
            self._ranks.wait()  # for what the first has written
        self._leaving[name] = self._own(stored) if self._form.on_disk else kept

    def _own(self, stored: Sequence[Tensor]) -> Sequence[Tensor]:
        return _Own(stored, self._ranks.share(range(len(self._batches))))


class _Own(Sequence[Tensor]):
    """The part of a sequence that is a rank's, read as it is asked for."""

    def __init__(self, everything: Sequence[Tensor], places: Sequence[int]) -> None:
        self._everything, self._places = everything, places

    def __getitem__(self, batch: Any) -> Any:
        return self._everything[self._places[batch]]

    def __len__(self) -> int:
        return len(self._places)
