"""Norms whose output goes to matrices alone, found by running a block; scales that move there.

Where `consumer(norm(x))` is all that becomes of a norm's output, each channel may be divided by a
number, and the matching column of every consumer multiplied by it: the block computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from claq_exp.models.blocks import BlockInputs, run_block, watched
from claq_exp.models.discover import find_waves, linears_of, norms_of
from claq_exp.models.experts import expert_lists, place_among_experts, router_weights
from claq_exp.system.distributed import ALONE, Ranks

FACTOR = 4.0  # a power of two: scaling by it rounds nothing
LEAST = 1e-3  # share of a fold's effect that may be left where it is undone
ROUNDINGS = 8.0  # of the type that a block runs in, where that is more

Key = tuple[int, int, int]


@dataclass(frozen=True)
class Fold:
    """A norm and everything that takes its output.

    norm: its name in the block.  offset: its output is (weight + offset) times the normalized
    input, plus a bias where it has one; 1 in Gemma, 0 elsewhere.
    consumers: names of modules with a weight [out, in] whose input it is: linears and routers.
    """

    norm: str
    offset: float
    consumers: tuple[str, ...]

    @property
    def weight(self) -> str:
        """Name of the norm's weight."""
        return f"{self.norm}.weight"

    def channels(self, block: nn.Module) -> Tensor:
        """Return what the norm multiplies each channel by: [in], float32 at least."""
        return _wide(block.get_parameter(self.weight)) + self.offset

    def divided(self, block: nn.Module, scales: Tensor) -> dict[str, Tensor]:
        """Return name -> the norm's parameters where its output is divided by scales [in]."""
        weight = self.channels(block) / scales - self.offset
        changed = {self.weight: weight}
        norm = block.get_submodule(self.norm)
        if (bias := getattr(norm, "bias", None)) is not None:
            changed[f"{self.norm}.bias"] = _wide(bias) / scales
        return changed

    def beside(self, block: nn.Module, factor: Tensor) -> dict[str, Tensor]:
        """Return name of each consumer's weight -> a factor [in], in the shape for it."""
        modules = {name: block.get_submodule(name) for name in self.consumers}
        return {
            f"{name}.weight": factor[:, None] if isinstance(module, Conv1D) else factor[None]
            for name, module in modules.items()
        }


@dataclass(frozen=True)
class Move:
    """Scales that go from a norm to the matrices behind it.

    scales: [in], what the norm's output is divided by, and the matrices' columns are multiplied by.
    """

    fold: Fold
    scales: Tensor

    def norm(
        self, block: nn.Module, rounded: Callable[[Tensor], Tensor] = lambda value: value
    ) -> dict[str, Tensor]:
        """Return name -> new value of the norm's parameters.

        rounded: brings a tensor into the type that it is stored in.  A channel that would be lost
        to it stays as it is.
        """
        old = self.fold.channels(block)
        scales = self.scales.to(old)
        new = rounded(self.fold.divided(block, scales)[self.fold.weight]).to(old) + self.fold.offset
        lost = ~new.isfinite() | ((new == 0) & (old != 0))
        divided = self.fold.divided(block, torch.where(lost, 1.0, scales))
        return {name: rounded(value) for name, value in divided.items()}

    def columns(self, block: nn.Module, norm: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return name of a weight -> what to multiply it by: [in], beside all others a 1.

        norm: its new parameters, whose rounding is made up for here.
        """
        old = self.fold.channels(block)
        new = norm[self.fold.weight].to(old) + self.fold.offset
        unused = (old == 0) | (new == 0)  # by the weight: there may be a bias
        factor = torch.where(unused, self.scales.to(old), old / torch.where(unused, 1.0, new))
        return self.fold.beside(block, factor)


class Transform(Protocol):
    """A way to rewrite a block before its matrices are quantized.

    passes: forward passes of the calibration text through each block that it takes.
    """

    passes: ClassVar[float]

    def run(self, block: nn.Module, inputs: BlockInputs, ranks: Ranks = ALONE) -> list[Move]:
        """Return the scales that are to move; the block is left as it was.

        inputs: with the hidden states of this rank's batches.  Every rank calls this and gets the
        same.
        """


@dataclass(frozen=True)
class NoTransform:
    """Leave the model as it is."""

    passes: ClassVar[float] = 0.0

    def run(self, block: nn.Module, inputs: BlockInputs, ranks: Ranks = ALONE) -> list[Move]:
        """Move nothing."""
        return []


UNTRANSFORMED = NoTransform()


def find_folds(block: nn.Module, inputs: BlockInputs) -> list[Fold]:
    """Run a block on its first batch and find the norms whose output scales can be moved out of.

    Which modules take a norm's output is seen by the tensor that they get; experts, which get some
    of its rows, belong to their router.  Whether nothing else takes it is tried: each fold is made
    with a power of two and must leave the block's output as it is.
    """
    made: dict[Key, list[str]] = {}
    taken: dict[Key, list[str]] = {}
    held: list[Tensor] = []  # so that no address is given twice
    consumers = _consumers(block)
    norms = {name: norm for name, norm in norms_of(block).items() if "weight" in norm._parameters}

    def note(found: dict[Key, list[str]], name: str) -> Callable[[Tensor], None]:
        def sink(tensor: Tensor) -> None:
            held.append(tensor)
            if tensor.numel():
                found.setdefault(_key(tensor), []).append(name)

        return sink

    takes = {module: note(taken, name) for name, module in consumers.items()}
    makes = {module: note(made, name) for name, module in norms.items()}
    with watched(takes, makes):
        run_block(block, inputs, 0)
    found = []
    for key, names in made.items():
        own = list(dict.fromkeys(taken.get(key, ())))
        if len(names) != 1 or not own:
            continue
        offset = _offset(norms[names[0]])
        if offset is not None:
            fold = Fold(names[0], offset, (*own, *_experts_of(block, inputs, own)))
            if _is_sound(block, inputs, fold):
                found.append(fold)
    return found


def _consumers(block: nn.Module) -> dict[str, nn.Module]:
    """Return name -> module with a matrix that multiplies what enters it."""
    routers = {name.rpartition(".")[0] for name in router_weights(block)}
    return {**linears_of(block), **{name: block.get_submodule(name) for name in sorted(routers)}}


def _experts_of(block: nn.Module, inputs: BlockInputs, consumers: list[str]) -> Iterator[str]:
    """Yield the first layers of the experts whose router is among the consumers."""
    lists = expert_lists(block)
    routers = {name.removesuffix(".weight") for name in router_weights(block)}
    beside = {name.rpartition(".")[0] for name in consumers if name in routers}
    fed = [name for name in lists if name.rpartition(".")[0] in beside]
    if not fed:
        return
    seen = set()
    for wave in find_waves(block, inputs):
        place = place_among_experts(wave[0].names[0], fed)
        if place is None or place.experts in seen:
            continue
        seen.add(place.experts)  # what its experts do first; the rest takes what comes of that
        for group in wave:
            yield from group.names


def _offset(norm: nn.Module) -> float | None:
    """Return what a norm adds to its weight before it multiplies; None for another rule."""
    weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
    values = torch.linspace(-1, 2, len(weight), device=weight.device, dtype=weight.dtype)
    kept = weight.detach().clone()
    try:
        for offset in (0.0, 1.0):
            weight.data.fill_(-offset)
            left = norm(values[None])
            if torch.equal(left, torch.zeros_like(left) + (0 if bias is None else bias)):
                return offset
    finally:
        weight.data.copy_(kept)
    return None


@torch.no_grad()
def _is_sound(block: nn.Module, inputs: BlockInputs, fold: Fold) -> bool:
    """Tell whether a block computes the same once scales are moved from a norm to its consumers."""
    scales = torch.ones_like(fold.channels(block))
    scales[::2] = FACTOR
    plain = run_block(block, inputs, 0)
    norm = fold.divided(block, scales)
    before = {name: block.get_parameter(name).clone() for name in norm}
    try:
        for name, value in norm.items():
            block.get_parameter(name).copy_(value)
        effect = _distance(run_block(block, inputs, 0), plain)
        with _multiplied(block, fold.beside(block, scales)):
            left = _distance(run_block(block, inputs, 0), plain)
    finally:
        for name, value in before.items():
            block.get_parameter(name).copy_(value)
    rounding = ROUNDINGS * torch.finfo(plain.dtype).eps
    return bool(left <= max(LEAST, rounding) * effect)


@contextmanager
def _multiplied(block: nn.Module, factors: Mapping[str, Tensor]) -> Iterator[None]:
    """Have weights multiplied by powers of two, as long as this is open."""
    weights = {name: block.get_parameter(name) for name in factors}
    for name, weight in weights.items():
        weight.mul_(factors[name].to(weight))
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.div_(factors[name].to(weight))


def _distance(output: Tensor, other: Tensor) -> Tensor:
    return (_wide(output) - _wide(other)).norm()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _key(tensor: Tensor) -> Key:
    """Tell a tensor by its memory: a view of it with another shape is the same."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.numel()
