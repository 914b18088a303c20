"""Quantizes a model block by block on the outputs of the blocks already quantized."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from claq_exp.calibration.moments import MomentsAccumulator
from claq_exp.calibration.streams import (
    AS_COMPUTED,
    STUDENT,
    TEACHER,
    HiddenForm,
    Streams,
    streams_for,
)
from claq_exp.calibration.token_weights import TokenWeights
from claq_exp.checkpoint.store import BlockStore
from claq_exp.checkpoint.writer import PackedWeight
from claq_exp.models.blocks import BlockInputs, block_arguments, entering_hidden, feed, run_block
from claq_exp.models.discover import (
    LinearGroup,
    Wave,
    apart,
    find_waves,
    linear_weight,
    linears_of,
)
from claq_exp.models.overlay import Overlay
from claq_exp.models.stream import BlockedModel, RowsOf
from claq_exp.payload import unpack_weight
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.moments import CROSS, OUTPUT_GRADIENTS, Moments
from claq_exp.quantize.recipe import Recipe
from claq_exp.run.ends import End, OwnEnds
from claq_exp.run.pending import Pending
from claq_exp.run.rewriting import rewrite
from claq_exp.run.solve import report_row, solve_linears
from claq_exp.run.teacher import TeacherBlock
from claq_exp.run.watcher import UNWATCHED, Watcher
from claq_exp.run_folder.fallbacks import refuse_fallbacks
from claq_exp.system.distributed import ALONE, Ranks, owners
from claq_exp.system.heap import trim
from claq_exp.system.interruption import Interrupted
from claq_exp.train.window import UNTUNED, Tune, Window
from claq_exp.transform.folding import UNTRANSFORMED, Transform

QUANTIZE, TUNING = "quantize", "tune"  # stages of the store


def quantize_model(  # noqa: PLR0913 - every one has a default, but what is quantized
    model: BlockedModel,
    batches: list[Tensor],
    recipe: Recipe,
    store: BlockStore,
    *,
    plans: Mapping[str, MatrixPlan] | None = None,
    hidden_form: HiddenForm = AS_COMPUTED,
    transform: Transform = UNTRANSFORMED,
    tune: Tune = UNTUNED,
    ends: Sequence[End] = (),
    weights: TokenWeights | None = None,
    watcher: Watcher = UNWATCHED,
    strict: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Quantize all linear layers of all decoder blocks into a store, and the model's ends.

    An embedding is quantized before the blocks, so that they can make up for its errors; a head,
    which may be the same matrix, behind them.
    Each block is rewritten before as `transform` says, and trained afterwards as `tune` says.

    One block is in memory at a time, and what enters it; what the store holds is taken over.  Where
    the solver wants the cross moment, the original of the block is in memory beside it.
    Several ranks share the batches, and solve linears side by side; every rank calls this, and
    ranks > 0 pass a `follower` of the first one's store.
    batches: token ids [batch, seqlen], all of one length.  store: open.
    plans: name of a linear or end -> what an allocation over the whole model decided of it.
    weights: of the tokens, where they do not count alike; each linear has moments of its own then.
    strict: raise NumericalError at the first layer with a fallback, see
        `claq_exp.run_folder.fallbacks`.
    Raises Interrupted once the group is in the store at which `watcher` wants to stop.
    """
    inputs = block_arguments(model, batches)
    model.overlay.update(store.dense())
    wants = recipe.solver.wants | tune.wants
    streams = Streams(streams_for(wants), batches, store, hidden_form, ranks)
    decided = [replace(end, decided=(plans or {}).get(end.name)) for end in ends]
    own = OwnEnds(model, ranks.share(batches), decided, store, watcher, strict, ranks)
    share = (1 - own.share) / len(model.blocks)
    _start(streams, model, own.embedding())
    if streams.block:
        watcher.share(streams.block * share, f"after block {streams.block - 1}")
    for index in range(streams.block, len(model.blocks)):
        path, seconds = f"{model.path}.{index}", {"calibrate": 0.0, "hessian": 0.0, "solve": 0.0}
        teacher = _teacher(model, index, inputs[index], streams, seconds, beside=CROSS in wants)
        inputs[index].hidden = streams.entering(STUDENT)
        rewrite(model, index, inputs[index], transform, store, seconds, watcher, ranks)
        packed = {f"{path}.{name}.weight" for name in linears_of(model.blocks[index])}
        with model.block(index, packed=packed) as module:
            block = _Block(
                module,
                inputs[index],
                path,
                index,
                recipe,
                plans or {},
                weights,
                strict,
                ranks,
                seconds,
            )
            block.quantize(store, watcher, share, teacher)
            if teacher is not None:
                streams.keep(TEACHER, _outputs(teacher.module, teacher.inputs, seconds))
                teacher = None  # its weights are in memory no longer than they are needed
            targets = streams.leaving(TEACHER) if TEACHER in streams.names else ()
            rounded = model.overlay.rounded
            window = Window(module, inputs[index], targets, len(batches), rounded, ranks)
            block.tune(tune, window, store, model.overlay, watcher)
            streams.keep(STUDENT, _outputs(module, inputs[index], seconds))
        streams.advance()
        inputs[index] = BlockInputs()
        watcher.event("block", {"block": index, **seconds})
    own.head(streams)


def _start(streams: Streams, model: BlockedModel, rows_of: RowsOf | None) -> None:
    """Begin with what enters the first block.

    rows_of: what the student's embedding looks up; None for its own rows.  It is large, and no
    longer in memory when this is done.
    """
    streams.start(
        lambda name, own: entering_hidden(model, own, rows_of if name == STUDENT else None),
        model.device,
    )


def _teacher(
    model: BlockedModel,
    index: int,
    inputs: BlockInputs,
    streams: Streams,
    seconds: dict[str, float],
    *,
    beside: bool,
) -> TeacherBlock | None:
    """Let the teacher's hidden states through an original block, where there are any.

    beside: have the block ready in place of that, to be run beside the student's.
    """
    if TEACHER not in streams.names:
        return None
    original = replace(inputs, hidden=streams.entering(TEACHER))
    if beside:
        return TeacherBlock.of(model, index, original)
    with model.block(index, original=True) as module:
        streams.keep(TEACHER, _outputs(module, original, seconds))
    return None


@torch.no_grad()
def _outputs(module: nn.Module, inputs: BlockInputs, seconds: dict[str, float]) -> Iterator[Tensor]:
    """Run every batch through a block; hidden states in memory are used up."""
    hidden = inputs.hidden
    for batch in range(len(hidden)):
        started = time.perf_counter()
        output = run_block(module, inputs, batch)
        seconds["calibrate"] += time.perf_counter() - started
        if isinstance(hidden, list):
            hidden[batch] = hidden[batch].new_empty(0)
        yield output


@dataclass
class _Block:
    """One block on its way: its waves are quantized in execution order (true-sequential)."""

    module: nn.Module
    inputs: BlockInputs
    path: str
    index: int
    recipe: Recipe
    plans: Mapping[str, MatrixPlan]
    weights: TokenWeights | None
    strict: bool
    ranks: Ranks
    seconds: dict[str, float]

    def quantize(
        self, store: BlockStore, watcher: Watcher, share: float, teacher: TeacherBlock | None
    ) -> None:
        """Quantize what the store does not hold yet of the block, and take over what it does.

        teacher: where the solver wants the cross moment.
        """
        done = store.packed(f"{self.path}.")
        for full_name, packed in done.items():
            self._take_over(full_name, packed)
        found_here = find_waves(self.module, self.inputs) if self.ranks.is_first else []
        waves = self.ranks.tell(found_here)
        if self.weights is not None:
            waves = apart(waves)
        groups = [group for wave in waves for group in wave]
        weights = sum(self._weight(name).numel() for group in groups for name in group.names)
        pending = Pending(store, QUANTIZE, self.index)
        for wave in waves:
            left = tuple(g for g in wave if not all(f"{self.path}.{n}" in done for n in g.names))
            found = self._accumulate(left, teacher) if left else {}
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

    def tune(
        self, strategy: Tune, window: Window, store: BlockStore, overlay: Overlay, watcher: Watcher
    ) -> None:
        """Train the block, unless an earlier try has; what it changes is in the store then."""
        if self.ranks.tell(store.has(TUNING, self.index)):
            return
        started = time.perf_counter()
        tuned = strategy.run(window)
        if not tuned.changed and not tuned.report:
            return
        dense: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, value in tuned.changed.items():
                full_name = f"{self.path}.{name}"
                dense[full_name] = overlay.change(full_name, value)
                self.module.get_parameter(name).copy_(dense[full_name])
        row = {"block": self.index, "name": self.path, **tuned.report}
        store.add(TUNING, self.index, dense=dense, report=[row])
        self.seconds["tune"] = time.perf_counter() - started
        watcher.event("tune", row)

    @torch.no_grad()
    def _accumulate(
        self, wave: Wave, teacher: TeacherBlock | None
    ) -> dict[LinearGroup, MomentsAccumulator]:
        """Run every batch once and sum up what enters each group of a wave."""
        found = {group: self._accumulator(group) for group in wave}
        weights = {group: self._own_weights(group) for group in wave}
        for batch in range(len(self.inputs.hidden)):
            where = f"calibration batch {self.ranks.number(batch)}"
            adds = {
                group.names[0]: self._adding(
                    accumulator,
                    f"{self.path}.{group.names[0]} ({where})",
                    weights[group][batch] if weights[group] else None,
                )
                for group, accumulator in found.items()
            }
            started, before = time.perf_counter(), self.seconds["hessian"]
            if teacher is None:
                sinks = {self.module.get_submodule(name): add for name, add in adds.items()}
                feed(self.module, self.inputs, batch, sinks)
            else:
                pairs = teacher.entering(self.module, self.inputs, batch, list(adds))
                for name, pair in pairs.items():
                    adds[name](*pair)
            within = self.seconds["hessian"] - before
            self.seconds["calibrate"] += time.perf_counter() - started - within
        return found

    def _accumulator(self, group: LinearGroup) -> MomentsAccumulator:
        wants, groups = self.recipe.solver.wants, 1
        if self.weights is not None:
            wants, groups = wants | {OUTPUT_GRADIENTS}, self.weights.objective.groups
        return MomentsAccumulator(self._weight(group.names[0]).shape[1], wants, groups)

    def _own_weights(self, group: LinearGroup) -> list[Tensor]:
        """Return what the tokens of this rank's batches weigh; nothing where they count alike."""
        if self.weights is None:
            return []
        return self.ranks.share(self.weights.of(f"{self.path}.{group.names[0]}"))

    def _adding(
        self, accumulator: MomentsAccumulator, where: str, weights: Tensor | None
    ) -> Callable[..., None]:
        def add(entering: Tensor, original: Tensor | None = None) -> None:
            started = time.perf_counter()
            own = None if weights is None else weights.to(entering.device)
            accumulator.add(entering, original, where=where, weights=own)
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
