"""Quantizes the embedding of a model before its blocks, and the head behind them.

One matrix that is both is a head.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from claq_exp.allocate.head import SurveyedHead
from claq_exp.calibration.moments import MomentsAccumulator
from claq_exp.calibration.streams import STUDENT, Streams
from claq_exp.checkpoint.store import BlockStore
from claq_exp.checkpoint.writer import PackedWeight
from claq_exp.errors import ConfigError
from claq_exp.models.blocks import entering_head
from claq_exp.models.ends import KEPT, Ends, EndsError, find_ends
from claq_exp.models.stream import BlockedModel, RowsOf
from claq_exp.payload import operand_of
from claq_exp.payload.base import Layout
from claq_exp.payload.gather import gathered
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.ends import FREQUENCY, EndRule
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.recipe import Recipe, planned_layout
from claq_exp.quantize.statistics import EqualColumns
from claq_exp.run.solve import report_row, solve_linears
from claq_exp.run.watcher import Watcher
from claq_exp.run_folder.fallbacks import refuse_fallbacks
from claq_exp.system.distributed import Ranks
from claq_exp.system.interruption import Interrupted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDING = "embedding"  # stage of the store
RELATIVE_WORK = 0.25  # on a weight of an end, where 1 is that on a weight of a block
FLOOR = 0.15  # what a token weighs that does not occur in the calibration text


@dataclass(frozen=True)
class End:
    """An embedding, a head, or the one matrix that is both.

    name: of its module.  rows: a row for each token.
    head: it is multiplied by hidden states; else it is only looked up.
    lookup, by_frequency: as `lookup` and `rows` of `claq_exp.quantize.ends.KMeansEnd`.
    tied: it is the embedding too.
    expected: about how it will be stored, where an allocation decides that.
    decided: what the allocation has decided, once it has.
    """

    name: str
    rows: int
    columns: int
    recipe: Recipe
    head: bool
    lookup: float = 0.0
    by_frequency: bool = False
    tied: bool = False
    expected: Layout | None = None
    decided: MatrixPlan | None = None

    @property
    def called(self) -> str:
        """What a person reads; the one matrix that is both is the embedding."""
        return "head" if self.head and not self.tied else EMBEDDING

    @property
    def allocated(self) -> bool:
        """Whether its widths are decided with those of the layers of blocks."""
        return self.recipe.allocated

    def surveyed(self) -> SurveyedHead:
        """Return what an allocation must know of it to survey it."""
        return SurveyedHead(self.name, self.tied, self.recipe.solver)

    def layout(self) -> Layout:
        """Return how it will be stored: exact, unless an allocation decides it."""
        if self.expected is not None:
            return self.expected
        return planned_layout(self.recipe, self.rows, self.columns, self.name)


def planned_ends(
    model: PreTrainedModel, embedding: EndRule, head: EndRule, *, strict: bool = False
) -> tuple[tuple[End, ...], str]:
    """Return what of a model's ends is quantized, and what to say where they cannot be.

    strict: refuse a model whose ends cannot be packed, whatever the rules say of it.
    Raises ConfigError as `chosen_ends`, but for ends that no rule requires to be packed.
    """
    try:
        return chosen_ends(model, embedding, head), ""
    except EndsError as error:
        if strict or required_ends(embedding, head):
            raise
        return (), f"{error.reason}{KEPT}"


def required_ends(embedding: EndRule, head: EndRule) -> bool:
    """Tell whether a model is refused whose embedding and head cannot be packed."""
    return any(rule.required for rule in (embedding, head) if rule.recipe() is not None)


def chosen_ends(model: PreTrainedModel, embedding: EndRule, head: EndRule) -> tuple[End, ...]:
    """Return what of a model's ends is quantized, by the rules of both.

    model: may be on the meta device.  Raises ConfigError for rules that do not fit the model,
    EndsError for a model whose ends cannot be packed.
    """
    first = embedding.looked_up()
    own = embedding.recipe() if head.copies() else head.recipe()
    if first is None and own is None:
        return ()
    found = find_ends(model)
    if found.tied:
        return (_tied(model, found, embedding, head),)
    ends = []
    if first is not None:
        ends.append(_end(model, found.embedding, first, embedding, head=False))
    if own is not None:
        rule = embedding if head.copies() else head
        ends.append(replace(_end(model, found.head, own, rule, head=True), lookup=0.0))
    asked = embedding.recipe()
    if asked is not None and asked.allocated and not any(end.allocated for end in ends):
        raise ConfigError(
            f"{type(model).__name__} has a head of its own, and only a head is allocated: leave "
            "head=same or set head=allocated, or choose embedding=kmeans"
        )
    return tuple(ends)


def _tied(model: PreTrainedModel, found: Ends, embedding: EndRule, head: EndRule) -> End:
    recipe = embedding.recipe()
    if recipe is None or not head.copies():
        raise ConfigError(
            f"{type(model).__name__} has one matrix for embedding and head: choose a rule with "
            "embedding=, and leave head=same"
        )
    return replace(_end(model, found.embedding, recipe, embedding, head=True), tied=True)


def _end(model: PreTrainedModel, name: str, recipe: Recipe, rule: EndRule, *, head: bool) -> End:
    rows, columns = model.get_submodule(name).get_parameter("weight").shape
    return End(name, rows, columns, recipe, head, rule.lookup, rule.rows == FREQUENCY)


@dataclass(frozen=True)
class OwnEnds:
    """The ends of a model that is being quantized into a store.

    batches: token ids of this rank, [batch, seqlen].  Every rank goes through the same calls; the
    first solves.
    """

    model: BlockedModel
    batches: list[Tensor]
    ends: Sequence[End]
    store: BlockStore
    watcher: Watcher
    strict: bool
    ranks: Ranks

    @property
    def share(self) -> float:
        """The share of the ends in all work on the model."""
        weights = sum(parameter.numel() for parameter in self.model.blocks.parameters())
        work = RELATIVE_WORK * sum(map(_weights, self.ends)) / weights
        return work / (1 + work)

    def embedding(self) -> RowsOf | None:
        """Quantize an embedding that is no head, unless the store has it.

        Returns what looks up its rows as they are packed, for the hidden states that enter the
        first block; None without such an embedding.
        Raises Interrupted where the watcher wants to stop, once it is in the store.
        """
        end = next((end for end in self.ends if not end.head), None)
        if end is None:
            return None
        made, described = None, None
        weights = _row_weights(self.batches, end, self.ranks)
        if self.ranks.is_first:
            made = self.store.packed(end.name).get(end.name)
            if made is None:
                self._step(end, 0.0)
                made = self._quantized(end, _lookups(end), weights, {"solve": 0.0})
            described = made.layout
        layout, tensors = self.ranks.broadcast(0, described, made.tensors if made else None)
        self._step(end, 1.0)
        if self.ranks.any(self.watcher.stopping()):
            raise Interrupted
        return partial(gathered, operand_of(layout, tensors))

    def head(self, streams: Streams) -> None:
        """Quantize a head, unless the store has it, on what leaves the last block.

        streams: all blocks are finished.  All ranks add up what enters the head.
        """
        end = next((end for end in self.ends if end.head), None)
        if end is None or self.ranks.tell(end.name in self.store.packed(end.name)):
            return
        seconds = {"calibrate": 0.0, "hessian": 0.0, "solve": 0.0}
        self._step(end, 0.0)
        weights = _row_weights(self.batches, end, self.ranks)
        entered = _entering(self.model, self.batches, end, streams, seconds)
        self._step(end, 0.5)
        entered.combine(self.ranks.sum_)
        if self.ranks.is_first:
            moments = _with_lookups(entered.moments(), end.lookup)
            self._quantized(end, moments, weights, seconds)
        self.ranks.wait()
        self._step(end, 0.5)

    def _quantized(
        self, end: End, moments: Moments, weights: Tensor | None, seconds: dict[str, float]
    ) -> PackedWeight:
        """Solve an end, keep it in the store and tell of it."""
        started = time.perf_counter()
        packed, row = _solve(self.model, end, moments, _plan(end, weights), strict=self.strict)
        seconds["solve"] = time.perf_counter() - started
        self.store.add(EMBEDDING, None, packed={end.name: packed}, report=[row])
        self.watcher.event("layer", row)
        told = {"stage": EMBEDDING, "name": end.name, "end": end.called, **seconds}
        self.watcher.event("stage", told)
        return packed

    def _step(self, end: End, done: float) -> None:
        """Tell of a share of the work on an end that is done, and what it is done on."""
        own = self.share * _weights(end) / sum(map(_weights, self.ends))
        self.watcher.share(done * own, end.name)


def _weights(end: End) -> int:
    return end.rows * end.columns


@torch.no_grad()
def _entering(
    model: BlockedModel,
    batches: list[Tensor],
    head: End,
    streams: Streams,
    seconds: dict[str, float],
) -> MomentsAccumulator:
    """Sum up what enters the head, over this rank's batches."""
    found = MomentsAccumulator(head.columns, head.recipe.solver.wants)
    if not batches:
        return found
    started = time.perf_counter()
    for entering in entering_head(model, batches, streams.entering(STUDENT)):
        summing = time.perf_counter()
        seconds["calibrate"] += summing - started
        found.add(entering, where="the head")
        started = time.perf_counter()
        seconds["hessian"] += started - summing
    return found


def _lookups(end: End) -> Moments:
    """Return the moments of a matrix that is looked up: an error in any entry costs the same."""
    return Moments(torch.eye(end.columns, dtype=torch.float64), disposable=True)


def _with_lookups(moments: Moments, share: float) -> Moments:
    """Return moments with a share of their mean diagonal on it, for a matrix that is both."""
    if share:
        diagonal = moments.hessian.diagonal(dim1=1, dim2=2)
        diagonal += share * diagonal.mean(dim=1, keepdim=True)
    return moments


def _row_weights(batches: list[Tensor], end: End, ranks: Ranks) -> Tensor | None:
    """Return how often each token occurs in the calibration text, and `FLOOR` for all.

    1 is as often as all do on average: [rows] float32; None where all rows weigh the same.
    """
    if not end.by_frequency:
        return None
    counts = torch.zeros(end.rows, dtype=torch.float64)
    for batch in batches:
        counts += torch.bincount(batch.reshape(-1).cpu(), minlength=end.rows)[: end.rows]
    ranks.sum_(counts)
    return (counts / counts.mean() + FLOOR).float()


def _plan(end: End, weights: Tensor | None) -> MatrixPlan | None:
    """Return what is known of an end before it is solved; None where its recipe says it all.

    weights: of rows, as `_row_weights` gives them.
    """
    decided = end.decided
    if decided is None and weights is not None:
        columns = end.recipe.plan(EqualColumns(end.rows, end.columns, end.name))
        decided = MatrixPlan(end.recipe.codebook, columns)
    return None if decided is None else replace(decided, row_weights=weights)


def _solve(
    model: BlockedModel, end: End, moments: Moments, plan: MatrixPlan | None, *, strict: bool
) -> tuple[PackedWeight, dict[str, Any]]:
    stored = model.read(f"{end.name}.weight").detach()
    matrix: Mapping[str, Tensor] = {end.name: stored.to("cpu", torch.float32)}
    tokens = moments.tokens if end.head else None
    plans = {} if plan is None else {end.name: plan}
    ((solved, seconds),) = solve_linears(
        matrix, moments, end.recipe, plans, model.device, strict=strict
    )
    row = report_row(None, end.name, solved, tokens, seconds)
    if strict:
        refuse_fallbacks(row)
    return PackedWeight(solved.quantized.layout(), solved.quantized.pack()), row
