"""What a strategy of the family `tune` is given of a block, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from claq_exp.models.blocks import BlockInputs
from claq_exp.system.distributed import ALONE, Ranks


@dataclass(frozen=True)
class Window:
    """A block whose matrices are quantized, and what flows through it: this rank's batches.

    module: the block; a strategy leaves it as it found it, `Tuned` says what is to change.
    inputs: with the student's hidden states that enter, one [batch, seqlen, width] per batch.
    teacher: what leaves the original block in the original model, of the same batches; nothing
    where the strategy does not want it.
    batches: how many batches all ranks have together; of this rank's, `ranks.number` says which.
    rounded: brings a tensor into the type that the checkpoint stores it in.
    """

    module: nn.Module
    inputs: BlockInputs
    teacher: Sequence[Tensor]
    batches: int
    rounded: Callable[[Tensor], Tensor] = lambda value: value
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Tuned:
    """What a strategy made of a window.

    changed: name of a parameter in the block -> its new value, the same on every rank.
    report: what it did, for the record of the run; empty where it did nothing.
    """

    changed: Mapping[str, Tensor] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What a strategy takes for each block.

    passes: forward passes of the calibration text.  states: tensors of the size of a batch's hidden
    states that it holds at once.
    """

    passes: float = 0.0
    states: float = 0.0


class Tune(Protocol):
    """A way to train a block.

    wants: what the run must have ready; `teacher` for the second stream of hidden states.
    """

    wants: ClassVar[frozenset[str]]

    def cost(self, batches: int) -> Cost:
        """Return what it takes.  batches: of calibration windows."""

    def run(self, window: Window) -> Tuned:
        """Train a block; every rank calls this with its own batches."""


@dataclass(frozen=True)
class NoTuning:
    """Leave everything as it is."""

    wants: ClassVar[frozenset[str]] = frozenset()

    def cost(self, batches: int) -> Cost:
        """Return nothing."""
        return Cost()

    def run(self, window: Window) -> Tuned:
        """Do nothing."""
        return Tuned()


UNTUNED = NoTuning()
