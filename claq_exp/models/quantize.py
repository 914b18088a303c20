"""Quantizes a model block by block on the outputs of the blocks already quantized."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from claq_exp.calibration.moments import MomentsAccumulator
from claq_exp.checkpoint.store import BlockStore
from claq_exp.checkpoint.writer import PackedWeight
from claq_exp.distributed import ALONE, Ranks, owners
from claq_exp.errors import CalibrationError
from claq_exp.fallbacks import refuse_fallbacks
from claq_exp.heap import trim
from claq_exp.interruption import Interrupted
from claq_exp.models.blocks import BlockInputs, block_arguments, entering_hidden, feed, run_block
from claq_exp.models.discover import LinearGroup, Stage, find_stages, linear_weight
from claq_exp.models.solve import report_row, solve_linears
from claq_exp.models.stream import BlockedModel
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.quantized import unpack_weight
from claq_exp.quantize.recipe import Recipe

PUBLISH_SECONDS = 5.0  # of solving that a kill may cost, where a group does not take longer


@dataclass(frozen=True)
class Watcher:
    """Who follows a quantization.

    event: called with ("layer", report row) and ("block", seconds by kind of work).
    share: called with (share of all work just done, where).
    stopping: asked after each group of linears whether to stop there.
    """

    event: Callable[[str, dict[str, Any]], None] = lambda _name, _data: None
    share: Callable[[float, str], None] = lambda _share, _where: None
    stopping: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class HiddenForm:
    """How hidden states are kept between blocks.

    dtype: None for that of the forward passes.  on_disk: read them from the store's file.
    """

    dtype: torch.dtype | None = None
    on_disk: bool = False

    def keep(
        self,
        entering: Iterable[Tensor],
        index: int,
        batches: list[Tensor],
        store: BlockStore,
        ranks: Ranks = ALONE,
    ) -> Sequence[Tensor]:
        """Publish what enters block `index`, and return what of it is this rank's.

        entering: [batch, seqlen, width] of each of this rank's batches.
        Raises CalibrationError when a value does not fit the type.
        """
        kept: list[Tensor] = []

        def noted() -> Iterator[Tensor]:
            for hidden in entering:
                cast = self._cast(hidden, index)
                if not self.on_disk:
                    kept.append(cast)
                yield cast

        states = ranks.in_order(noted(), len(batches))
        first = next(states, None)  # there is none on other ranks than the first
        like = {
            str(number): first.new_empty(*batch.shape, first.shape[-1], device="meta")
            for number, batch in enumerate(batches)
            if first is not None
        }
        store.begin_block(index, chain(() if first is None else (first,), states), like)
        ranks.wait()  # for what the first has published
        return _own(store.activations() or (), ranks) if self.on_disk else kept

    def _cast(self, hidden: Tensor, index: int) -> Tensor:
        cast = hidden.to(self.dtype or hidden.dtype)
        if cast.dtype != hidden.dtype and not torch.isfinite(cast).all():
            raise CalibrationError(
                f"hidden states up to {hidden.abs().max().item():.3g} enter block {index}, beyond "
                f"{self.dtype}; set calibration.keep_in=bfloat16 or float32"
            )
        return cast


def quantize_model(  # noqa: PLR0913 - every one has a default, but what is quantized
    model: BlockedModel,
    batches: list[Tensor],
    recipe: Recipe,
    store: BlockStore,
    *,
    plans: Mapping[str, MatrixPlan] | None = None,
    hidden_form: HiddenForm = HiddenForm(),
    watcher: Watcher = Watcher(),
    strict: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Quantize all linear layers of all decoder blocks into a store.

    One block is in memory at a time, and what enters it; what the store holds is taken over.
    Several ranks share the batches, and solve linears side by side; all call this, and the others
    than the first with a `follower` of its store.
    batches: token ids [batch, seqlen], all of one length.  store: open.
    plans: name of a linear -> what an allocation over the whole model decided of it.
    strict: raise NumericalError at the first layer with a fallback, see `claq_exp.fallbacks`.
    Raises Interrupted once the group is in the store at which `watcher` wants to stop.
    """
    inputs = block_arguments(model, batches)
    hidden: Sequence[Tensor]
    entering = store.activations()
    if entering is None:
        own = entering_hidden(model, ranks.share(batches))
        hidden = hidden_form.keep(own, 0, batches, store, ranks)
    else:
        hidden = _own(entering, ranks)
        hidden = hidden if hidden_form.on_disk else [t.to(model.device) for t in hidden]
    share = 1 / len(model.blocks)
    if store.blocks:
        watcher.share(store.blocks * share, f"after block {store.blocks - 1}")
    for index in range(store.blocks, len(model.blocks)):
        inputs[index].hidden = hidden
        with model.block(index) as module:
            block = _Block(
                module,
                inputs[index],
                f"{model.path}.{index}",
                index,
                recipe,
                plans or {},
                strict,
                ranks,
            )
            block.quantize(store, watcher, share)
            hidden = hidden_form.keep(block.outputs(), index + 1, batches, store, ranks)
        inputs[index] = BlockInputs()
        watcher.event("block", {"block": index, **block.seconds})


class _Own(Sequence[Tensor]):
    """The part of a sequence that is a rank's, read as it is asked for."""

    def __init__(self, everything: Sequence[Tensor], places: Sequence[int]) -> None:
        self._everything, self._places = everything, places

    def __getitem__(self, batch: Any) -> Any:
        return self._everything[self._places[batch]]

    def __len__(self) -> int:
        return len(self._places)


def _own(everything: Sequence[Tensor], ranks: Ranks) -> Sequence[Tensor]:
    return _Own(everything, ranks.share(range(len(everything))))


@dataclass
class _Block:
    """One block on its way: its stages are quantized in execution order (true-sequential)."""

    module: nn.Module
    inputs: BlockInputs
    path: str
    index: int
    recipe: Recipe
    plans: Mapping[str, MatrixPlan]
    strict: bool
    ranks: Ranks
    seconds: dict[str, float] = field(
        default_factory=lambda: {"calibrate": 0.0, "hessian": 0.0, "solve": 0.0}
    )

    def quantize(self, store: BlockStore, watcher: Watcher, share: float) -> None:
        """Quantize what the store does not hold yet of the block, and take over what it does."""
        done = store.packed(self.index)
        for full_name, packed in done.items():
            self._take_over(full_name, packed)
        found_here = find_stages(self.module, self.inputs) if self.ranks.is_first else []
        stages = self.ranks.tell(found_here)
        groups = [group for stage in stages for group in stage]
        weights = sum(self._weight(name).numel() for group in groups for name in group.names)
        pending = _Pending(store, self.index)
        for stage in stages:
            left = tuple(g for g in stage if not all(f"{self.path}.{n}" in done for n in g.names))
            found = self._accumulate(left) if left else {}
            for start in range(0, len(left), self.ranks.size):
                together = left[start : start + self.ranks.size]
                for packed, row in self._solve(together, found):
                    pending.add(packed, row)
                    watcher.event("layer", row)
                    watcher.share(share * packed.layout.weights / weights, row["name"])
                stopping = self.ranks.any(watcher.stopping())
                pending.publish(now=stopping)
                trim()
                if stopping:
                    raise Interrupted
        pending.publish(now=True)

    @torch.no_grad()
    def _take_over(self, full_name: str, packed: PackedWeight) -> None:
        weight = unpack_weight(packed.layout, packed.tensors)
        self._weight(full_name.removeprefix(f"{self.path}.")).copy_(weight.dequantize())

    def outputs(self) -> Iterator[Tensor]:
        """Run every batch through the quantized block; hidden states in memory are used up."""
        hidden = self.inputs.hidden
        for batch in range(len(hidden)):
            started = time.perf_counter()
            output = run_block(self.module, self.inputs, batch)
            self.seconds["calibrate"] += time.perf_counter() - started
            if isinstance(hidden, list):
                hidden[batch] = hidden[batch].new_empty(0)
            yield output

    @torch.inference_mode()
    def _accumulate(self, stage: Stage) -> dict[LinearGroup, MomentsAccumulator]:
        """Run every batch once and sum up what enters each group of a stage."""
        found = {
            group: MomentsAccumulator(
                self._weight(group.names[0]).shape[1], self.recipe.solver.wants
            )
            for group in stage
        }
        for batch in range(len(self.inputs.hidden)):
            where = f"calibration batch {self.ranks.number(batch)}"
            sinks = {
                self.module.get_submodule(group.names[0]): self._sink(
                    accumulator, f"{self.path}.{group.names[0]} ({where})"
                )
                for group, accumulator in found.items()
            }
            started, before = time.perf_counter(), self.seconds["hessian"]
            feed(self.module, self.inputs, batch, sinks)
            within = self.seconds["hessian"] - before
            self.seconds["calibrate"] += time.perf_counter() - started - within
        return found

    def _sink(self, accumulator: MomentsAccumulator, where: str) -> Callable[[Tensor], None]:
        def add(entering: Tensor) -> None:
            started = time.perf_counter()
            accumulator.add(entering, where=where)
            self.seconds["hessian"] += time.perf_counter() - started

        return add

    def _solve(
        self, together: Sequence[LinearGroup], found: dict[LinearGroup, MomentsAccumulator]
    ) -> Iterator[tuple[PackedWeight, dict[str, Any]]]:
        """Solve groups, each rank its own part; yield what came of every linear, on all ranks.

        together: as many groups as ranks at most.  found: its sums are used up.
        """
        started = time.perf_counter()
        for group in together:
            found[group].combine(self.ranks.sum_)
        self.seconds["hessian"] += time.perf_counter() - started
        started = time.perf_counter()
        owner = self._owners(together)
        solved: dict[str, tuple[PackedWeight, dict[str, Any]]] = {}
        for group in together:
            own = [name for name in group.names if owner[name] == self.ranks.rank]
            accumulator = found.pop(group)
            if own:
                solved |= self._solve_own(own, accumulator.moments())
        for group in together:
            for name in group.names:
                yield self._exchanged(name, owner[name], solved.pop(name, None))
        self.seconds["solve"] += time.perf_counter() - started

    def _owners(self, together: Sequence[LinearGroup]) -> dict[str, int]:
        """Say which rank solves each linear: a group goes to one of them, unless it is alone."""
        if len(together) == 1:
            names = together[0].names
            return owners({n: self._weight(n).numel() for n in names}, self.ranks.size)
        return {name: rank for rank, group in enumerate(together) for name in group.names}

    @torch.no_grad()
    def _solve_own(
        self, names: Sequence[str], moments: Moments
    ) -> dict[str, tuple[PackedWeight, dict[str, Any]]]:
        """Solve linears that share an input; return name -> (packed weight, report row)."""
        weights = {
            f"{self.path}.{name}": self._weight(name).detach().to("cpu", torch.float32)
            for name in names
        }
        device = self._weight(names[0]).device
        found = {}
        solutions = solve_linears(
            weights, moments, self.recipe, self.plans, device, strict=self.strict
        )
        for name, (solved, seconds) in zip(names, solutions, strict=True):
            quantized = solved.quantized
            self._weight(name).copy_(quantized.dequantize())
            row = report_row(self.index, f"{self.path}.{name}", solved, moments.tokens, seconds)
            if self.strict:
                refuse_fallbacks(row)
            found[name] = PackedWeight(quantized.layout(), quantized.pack()), row
        return found

    def _exchanged(
        self, name: str, owner: int, own: tuple[PackedWeight, dict[str, Any]] | None
    ) -> tuple[PackedWeight, dict[str, Any]]:
        """Give all ranks what one of them made of a linear, and have it in the block."""
        described, tensors = None, None
        if own is not None:
            described, tensors = (own[0].layout, own[1]), own[0].tensors
        (layout, row), received = self.ranks.broadcast(owner, described, tensors)
        packed = PackedWeight(layout, received)
        if own is None:
            self._take_over(f"{self.path}.{name}", packed)
        return packed, row

    def _weight(self, name: str) -> Tensor:
        return linear_weight(self.module.get_submodule(name))


@dataclass
class _Pending:
    """Finished linears that are not in the store yet."""

    store: BlockStore
    block: int
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    report: list[dict[str, Any]] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    def add(self, packed: PackedWeight, row: dict[str, Any]) -> None:
        self.packed[row["name"]] = packed
        self.report.append(row)

    def publish(self, *, now: bool) -> None:
        """Bring them into the store, now or when it is time to."""
        if self.packed and (now or time.monotonic() - self.since > PUBLISH_SECONDS):
            self.store.add(self.block, self.packed, self.report)
            self.packed, self.report, self.since = {}, [], time.monotonic()
