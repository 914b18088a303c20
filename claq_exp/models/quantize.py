"""Quantizes a model block by block on the outputs of the blocks already quantized."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from claq_exp.calibration.hessian import HessianAccumulator
from claq_exp.checkpoint.store import BlockStore
from claq_exp.checkpoint.writer import PackedWeight
from claq_exp.errors import NumericalError
from claq_exp.models.blocks import BlockInputs, capture_inputs, feed, run_block
from claq_exp.models.discover import LinearGroup, Stage, find_blocks, find_stages, linear_weight
from claq_exp.models.solve import report_row, solve_group
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, Solved

EventSink = Callable[[str, dict[str, Any]], None]
ShareSink = Callable[[float, str], None]


@dataclass
class QuantizedModel:
    """Every quantized linear by its name in the model, and a report row for each."""

    packed: dict[str, PackedWeight] = field(default_factory=dict)
    report: list[dict[str, Any]] = field(default_factory=list)


def quantize_model(
    model: nn.Module,
    batches: list[Tensor],
    recipe: Recipe,
    store: BlockStore,
    *,
    plans: Mapping[str, MatrixPlan] | None = None,
    blocks_path: str | None = None,
    on_event: EventSink = lambda _name, _data: None,
    on_share: ShareSink = lambda _share, _detail: None,
) -> QuantizedModel:
    """Quantize all linear layers of all decoder blocks; their weights become the dequantized ones.

    batches: token ids [batch, seqlen] on the model's device, all of one shape.
    store: blocks that it holds are taken over (their weights in `model` stay as they are); new ones
        are added as they finish.
    plans: name of a linear -> what an allocation over the whole model decided of it.
    on_event: called with ("layer", report row) and ("block", seconds by kind of work).
    on_share: called with (share of all work just done, where).
    """
    path, blocks = find_blocks(model, blocks_path)
    finished = store.open()
    inputs = capture_inputs(model, blocks, batches)
    result = QuantizedModel(*store.load_blocks())
    if finished:
        on_share(finished / len(blocks), f"after block {finished - 1}")
    if 0 < finished < len(blocks):
        inputs[0].hidden = []
        device = batches[0].device
        inputs[finished].hidden = [hidden.to(device) for hidden in store.load_activations()]
    for index in range(finished, len(blocks)):
        block = _Block(blocks[index], inputs[index], f"{path}.{index}", index, recipe, plans or {})
        packed, report = block.quantize(
            on_event, lambda share, name: on_share(share / len(blocks), name)
        )
        hidden = block.outputs()
        inputs[index].hidden = []
        if index + 1 < len(blocks):
            inputs[index + 1].hidden = hidden
        store.save_block(packed, report, hidden)
        on_event("block", {"block": index, **block.seconds})
        result.packed.update(packed)
        result.report.extend(report)
    return result


@dataclass
class _Block:
    """One block on its way: its stages are quantized in execution order (true-sequential)."""

    module: nn.Module
    inputs: BlockInputs
    path: str
    index: int
    recipe: Recipe
    plans: Mapping[str, MatrixPlan]
    seconds: dict[str, float] = field(
        default_factory=lambda: {"calibrate": 0.0, "hessian": 0.0, "solve": 0.0}
    )

    def quantize(
        self, on_event: EventSink, on_share: ShareSink
    ) -> tuple[dict[str, PackedWeight], list[dict[str, Any]]]:
        packed: dict[str, PackedWeight] = {}
        report: list[dict[str, Any]] = []
        stages = find_stages(self.module, self.inputs)
        groups = [group for stage in stages for group in stage]
        weights = sum(self._weight(name).numel() for group in groups for name in group.names)
        for stage in stages:
            found = self._accumulate(stage)
            for group in stage:
                tokens, hessian = found[group].tokens, found.pop(group).hessian()
                for name, solved, seconds in self._solve(group, hessian):
                    full_name = f"{self.path}.{name}"
                    quantized = solved.quantized
                    packed[full_name] = PackedWeight(quantized.layout(), quantized.pack())
                    report.append(report_row(self.index, full_name, solved, tokens, seconds))
                    on_event("layer", report[-1])
                    on_share(self._weight(name).numel() / weights, full_name)
        return packed, report

    def outputs(self) -> list[Tensor]:
        """Run every batch through the quantized block."""
        started = time.perf_counter()
        batches = range(len(self.inputs.hidden))
        hidden = [run_block(self.module, self.inputs, batch) for batch in batches]
        self.seconds["calibrate"] += time.perf_counter() - started
        return hidden

    @torch.inference_mode()
    def _accumulate(self, stage: Stage) -> dict[LinearGroup, HessianAccumulator]:
        """Run every batch once and sum up what enters each group of a stage."""
        found = {
            group: HessianAccumulator(self._weight(group.names[0]).shape[1]) for group in stage
        }
        for batch in range(len(self.inputs.hidden)):
            sinks = {
                self.module.get_submodule(group.names[0]): self._sink(
                    accumulator, f"{self.path}.{group.names[0]} (calibration batch {batch})"
                )
                for group, accumulator in found.items()
            }
            started, before = time.perf_counter(), self.seconds["hessian"]
            feed(self.module, self.inputs, batch, sinks)
            within = self.seconds["hessian"] - before
            self.seconds["calibrate"] += time.perf_counter() - started - within
        return found

    def _sink(self, accumulator: HessianAccumulator, where: str) -> Callable[[Tensor], None]:
        def add(entering: Tensor) -> None:
            started = time.perf_counter()
            accumulator.add(entering, where)
            self.seconds["hessian"] += time.perf_counter() - started

        return add

    @torch.no_grad()
    def _solve(self, group: LinearGroup, hessian: Tensor) -> list[tuple[str, Solved, float]]:
        """Solve the linears of a group; return (name, solution, seconds) of each."""
        started = time.perf_counter()
        names = [f"{self.path}.{name}" for name in group.names]
        device = self._weight(group.names[0]).device
        try:
            system = self.recipe.solver.prepare(hessian.to(device))
        except NumericalError as error:
            raise NumericalError(f"{names[0]}: {error}") from error
        problems = [
            LinearProblem(self._weight(name).detach().to("cpu", torch.float32), hessian, full_name)
            for name, full_name in zip(group.names, names, strict=True)
        ]
        solutions = solve_group(problems, system, self.recipe, self.plans, device)
        for name, (solved, _) in zip(group.names, solutions, strict=True):
            self._weight(name).copy_(solved.quantized.dequantize())
        self.seconds["solve"] += time.perf_counter() - started
        return [(name, *found) for name, found in zip(group.names, solutions, strict=True)]

    def _weight(self, name: str) -> Tensor:
        return linear_weight(self.module.get_submodule(name))
