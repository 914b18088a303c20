"""Quantizes a model block by block on the outputs of the blocks already quantized."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from claq_exp.calibration.hessian import HessianAccumulator
from claq_exp.checkpoint.store import BlockStore
from claq_exp.checkpoint.writer import PackedWeight
from claq_exp.errors import NumericalError
from claq_exp.models.blocks import BlockInputs, capture_inputs, run_block, run_until
from claq_exp.models.discover import LinearGroup, find_blocks, find_groups, linear_weight
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, Solved, quantize_weight


@dataclass
class QuantizedModel:
    """Every quantized linear by its name in the model, a report row for each, and seconds by kind
    of work.
    """

    packed: dict[str, PackedWeight] = field(default_factory=dict)
    report: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"calibrate": 0.0, "hessian": 0.0, "solve": 0.0}
    )


def quantize_model(
    model: nn.Module,
    windows: list[Tensor],
    recipe: Recipe,
    store: BlockStore,
    *,
    blocks_path: str | None = None,
    on_layer: Callable[[dict[str, Any]], None] = lambda _: None,
    on_share: Callable[[float, str], None] = lambda _share, _detail: None,
) -> QuantizedModel:
    """Quantize all linear layers of all decoder blocks; the model's weights become their
    dequantized values.

    windows: token batches [batch, seqlen] on the model's device, of one shape.
    store: blocks that it holds are taken over; new ones are added as they finish.
    on_layer: called with each new report row.  on_share: called with (share of all work done,
    where).
    """
    path, blocks = find_blocks(model, blocks_path)
    result = QuantizedModel()
    finished = store.open()
    started = time.perf_counter()
    inputs = capture_inputs(model, blocks, windows)
    if finished:
        result.packed, result.report = store.load_blocks()
        for row in result.report:
            on_layer(row)
        on_share(finished / len(blocks), f"{finished} blocks found")
    if 0 < finished < len(blocks):
        inputs[0].hidden = []
        inputs[finished].hidden = [
            hidden.to(windows[0].device) for hidden in store.load_activations()
        ]
    result.seconds["calibrate"] += time.perf_counter() - started
    for index in range(finished, len(blocks)):
        prefix = f"{path}.{index}"
        worker = _BlockWorker(blocks[index], inputs[index], prefix, index, recipe, result)
        packed, rows = worker.quantize(
            on_layer, lambda share, name: on_share(share / len(blocks), name)
        )
        hidden = worker.outputs()
        inputs[index].hidden = []
        if index + 1 < len(blocks):
            inputs[index + 1].hidden = hidden
        store.save_block(packed, rows, hidden)
        result.packed.update(packed)
        result.report.extend(rows)
    return result


@dataclass
class _BlockWorker:
    """One block on its way: its groups are quantized in execution order (true-sequential)."""

    block: nn.Module
    inputs: BlockInputs
    prefix: str
    index: int
    recipe: Recipe
    result: QuantizedModel

    def quantize(
        self,
        on_layer: Callable[[dict[str, Any]], None],
        on_share: Callable[[float, str], None],
    ) -> tuple[dict[str, PackedWeight], list[dict[str, Any]]]:
        packed: dict[str, PackedWeight] = {}
        rows: list[dict[str, Any]] = []
        groups = find_groups(self.block, self.inputs)
        weights = sum(self._linear(name).numel() for group in groups for name in group.names)
        for group in groups:
            hessian = self._hessian(group)
            started = time.perf_counter()
            try:
                system = self.recipe.solver.prepare(hessian)
            except NumericalError as error:
                raise NumericalError(f"{self.prefix}.{group.names[0]}: {error}") from error
            self.result.seconds["solve"] += time.perf_counter() - started
            for name in group.names:
                started = time.perf_counter()
                solved = self._solve(name, hessian, system)
                seconds = time.perf_counter() - started
                self.result.seconds["solve"] += seconds
                full_name = f"{self.prefix}.{name}"
                packed[full_name] = PackedWeight(solved.quantized.layout(), solved.quantized.pack())
                rows.append(_report_row(self.index, full_name, solved, seconds))
                on_layer(rows[-1])
                on_share(self._linear(name).numel() / weights, full_name)
        return packed, rows

    @torch.inference_mode()
    def outputs(self) -> list[Tensor]:
        """Run every batch through the quantized block."""
        started = time.perf_counter()
        hidden = [
            run_block(self.block, self.inputs, batch) for batch in range(len(self.inputs.hidden))
        ]
        self.result.seconds["calibrate"] += time.perf_counter() - started
        return hidden

    @torch.inference_mode()
    def _hessian(self, group: LinearGroup) -> Tensor:
        first = self.block.get_submodule(group.names[0])
        accumulator = HessianAccumulator(self._linear(group.names[0]).shape[1])
        for batch in range(len(self.inputs.hidden)):
            started = time.perf_counter()
            entering = run_until(self.block, self.inputs, batch, first)
            middle = time.perf_counter()
            accumulator.add(entering, f"{self.prefix}.{group.names[0]} (calibration batch {batch})")
            self.result.seconds["calibrate"] += middle - started
            self.result.seconds["hessian"] += time.perf_counter() - middle
        return accumulator.hessian()

    @torch.no_grad()
    def _solve(self, name: str, hessian: Tensor, system: Any) -> Solved:
        weight = self._linear(name)
        try:
            problem = LinearProblem(weight.detach().to("cpu", torch.float32), hessian)
            solved = quantize_weight(problem, system, self.recipe)
        except NumericalError as error:
            raise NumericalError(f"{self.prefix}.{name}: {error}") from error
        weight.copy_(solved.quantized.dequantize())
        return solved

    def _linear(self, name: str) -> Tensor:
        return linear_weight(self.block.get_submodule(name))


def _report_row(index: int, name: str, solved: Solved, seconds: float) -> dict[str, Any]:
    layout = solved.quantized.layout()
    return {
        "block": index,
        "name": name,
        "rows": layout.rows,
        "cols": layout.columns,
        "nominal_bits": layout.nominal_bits(),
        "bits": layout.ledger().total / layout.weights,
        "reserved": layout.reserved,
        "output_error": solved.output_error,
        "weight_error": solved.weight_error,
        "damping": solved.damping,
        "dead_columns": solved.dead_columns,
        "seconds": seconds,
    }
