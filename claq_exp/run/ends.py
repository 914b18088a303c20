"""Quantizes the embedding and the head of a model, once its blocks are done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from claq_exp.models.ends import Ends, find_ends
from claq_exp.models.stream import BlockedModel
from claq_exp.payload.base import Layout
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.ends import FREQUENCY, EndRule
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.recipe import Recipe, planned_layout
from claq_exp.quantize.statistics import EqualColumns
from claq_exp.run.solve import report_row, solve_linears
from claq_exp.run_folder.fallbacks import refuse_fallbacks
from claq_exp.system.distributed import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDING = "embedding"  # stage of the store
FLOOR = 0.15  # what a token weighs that does not occur in the calibration text


@dataclass(frozen=True)
class End:
    """An embedding, a head, or the one matrix that is both.

    name: of its module.  rows: a row for each token.
    head: it is multiplied by hidden states; else it is only looked up.
    lookup, by_frequency: as `lookup` and `rows` of `claq_exp.quantize.ends.KMeansEnd`.
    tied: it is the embedding too.
    expected: about how it will be stored, where an allocation decides that.
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


def chosen_ends(model: PreTrainedModel, embedding: EndRule, head: EndRule) -> tuple[End, ...]:
    """Return what of a model's ends is quantized, by the rules of both.

    model: may be on the meta device.  Raises ConfigError for rules that do not fit the model.
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


def quantize_ends(
    model: BlockedModel,
    batches: list[Tensor],
    ends: Sequence[End],
    streams: Streams,
    store: BlockStore,
    plans: Mapping[str, MatrixPlan] | None,
    strict: bool,
    ranks: Ranks,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Quantize the ends of a model into a store, on the hidden states that leave its last block.

    batches: token ids of this rank, [batch, seqlen].  streams: all blocks are finished.
    plans: as of `claq_exp.run.quantize.quantize_model`.
    The first rank solves; all add up what enters the head.
    Returns the rows of the report of what was quantized here, and seconds by kind of work.
    """
    seconds = {"calibrate": 0.0, "hessian": 0.0, "solve": 0.0}
    if not ends or ranks.tell(store.has(EMBEDDING, None)):
        return [], seconds
    head = next((end for end in ends if end.head), None)
    weights = {e.name: _frequencies(batches, e.rows, ranks) for e in ends if e.by_frequency}
    gathered = None
    if head is not None:
        gathered = _entering(model, batches, head, streams, seconds)
        gathered.combine(ranks.sum_)
    packed: dict[str, PackedWeight] = {}
    report = []
    started = time.perf_counter()
    for end in ends if ranks.is_first else ():
        measured = gathered.moments() if end.head and gathered is not None else _lookups(end)
        moments = _with_lookups(measured, end.lookup)
        plan = _plan(end, (plans or {}).get(end.name), weights.get(end.name))
        weight, row = _solve(model, end, moments, plan, strict=strict)
        packed[end.name] = weight
        report.append(row)
    seconds["solve"] = time.perf_counter() - started
    store.add(EMBEDDING, None, packed=packed, report=report)
    ranks.wait()
    return report, seconds


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


def _frequencies(batches: list[Tensor], rows: int, ranks: Ranks) -> Tensor:
    """Return how often each token occurs in the calibration text, and `FLOOR` for all.

    1 is as often as all do on average: [rows] float32.
    """
    counts = torch.zeros(rows, dtype=torch.float64)
    for batch in batches:
        counts += torch.bincount(batch.reshape(-1).cpu(), minlength=rows)[:rows]
    ranks.sum_(counts)
    return (counts / counts.mean() + FLOOR).float()


def _plan(end: End, decided: MatrixPlan | None, weights: Tensor | None) -> MatrixPlan | None:
    """Return what is known of an end before it is solved; None where its recipe says it all.

    decided: by an allocation.  weights: of rows, as `_frequencies` gives them.
    """
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
