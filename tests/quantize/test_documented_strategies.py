"""The strategies that docs/ show do what they say; test_documents.py runs their commands."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from own_strategies import forget_strategies, write_strategies
from quantize_references import random_problem, recipe, solve

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny_architectures import ARCHITECTURES, token_batches

from claq_exp.models.blocks import capture_inputs, run_block
from claq_exp.models.stream import WholeModel
from claq_exp.payload import operand_of, read_layout, unpack_weight
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.solver import Nearest
from claq_exp.quantize.statistics import ColumnStatistics
from claq_exp.runtime.kernels.reference import dense_rows
from claq_exp.train.window import Window

BATCHES = token_batches(3, size=2)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> dict[str, ModuleType]:
    folder = tmp_path_factory.mktemp("strategies")
    names = write_strategies(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield {name: importlib.import_module(name) for name in names}
    forget_strategies(names)


def test_there_is_an_example_of_each_kind_and_it_is_short(examples):
    assert set(examples) == {
        *("clipped", "descent", "row_signs", "even_columns", "rescale_norms"),
        "my_rules",  # of docs/strategies.md
    }
    for module in examples.values():
        lines = filter(None, Path(module.__file__).read_text().splitlines())
        code = [line for line in lines if not line.startswith(("from ", "import "))]
        assert len(code) <= 45


def test_the_rule_gives_more_bits_to_the_largest_columns(examples):
    weight = torch.ones(5, 10)
    weight[:, [2, 7]] = -3
    columns = torch.arange(10)
    bits = (
        examples["my_rules"]
        .TopColumns(share=0.2)
        .plan(ColumnStatistics(weight, torch.ones(10), columns))
    )
    assert bits.tolist() == [4 if column in (2, 7) else 2 for column in range(10)]


@pytest.mark.parametrize(("share", "inside"), [(0.0, 1.0), (0.1, 0.8)])
def test_the_codebook_covers_what_lies_between_its_quantiles(examples, share, inside):
    weight, hessian = random_problem(40, 9, seed=1)
    rule = examples["clipped"].Clipped(share)
    found = solve(weight, hessian, recipe(codebook=rule, solver=Nearest())).quantized.dequantize()
    assert all(len(column.unique()) <= 8 for column in found.t())
    low, high = (torch.quantile(weight, q, dim=0) for q in (share, 1 - share))
    assert found.amin(dim=0).numpy() == pytest.approx(low.numpy(), rel=2e-3)
    assert found.amax(dim=0).numpy() == pytest.approx(high.numpy(), rel=2e-3)
    step = (high - low) / 7
    covered = (weight >= low) & (weight <= high)
    assert covered.float().mean() >= inside - 0.03
    assert ((found - weight).abs() <= 0.51 * step)[covered].all()


def test_the_solver_never_ends_above_rounding_to_nearest(examples):
    weight, hessian = random_problem(24, 12, seed=2)
    nearest = solve(weight, hessian, recipe(solver=Nearest()))
    errors = [
        solve(weight, hessian, recipe(solver=examples["descent"].Descent(sweeps))).output_error
        for sweeps in (0, 1, 3)
    ]
    assert errors[0] == pytest.approx(nearest.output_error, rel=1e-4)
    assert errors[2] < 0.7 * errors[0]


def test_the_stored_form_comes_back_and_kernels_read_it(examples):
    weight, hessian = random_problem(13, 10, seed=3)
    rule = examples["row_signs"].SignPerRow()
    solved = solve(weight, hessian, recipe(codebook=rule, precision=Fixed(1), solver=Nearest()))
    payload = solved.quantized
    layout = read_layout(json.loads(json.dumps(payload.layout().to_json())))
    tensors = payload.pack()
    again = unpack_weight(layout, tensors)
    assert type(again) is examples["row_signs"].RowSigns
    expected = weight.sign() * weight.abs().mean(dim=1).half().float()[:, None]
    assert torch.equal(again.dequantize(), expected)
    assert torch.equal(dense_rows(operand_of(layout, tensors), 0, 13), expected)
    assert layout.ledger().total == 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert layout.nominal_bits() == 1


@torch.no_grad()
def test_the_transform_evens_columns_and_keeps_the_output(examples):
    model = WholeModel(ARCHITECTURES["llama"].build().double())
    inputs = capture_inputs(model, BATCHES)[0]
    block = model.blocks[0]
    before = [run_block(block, inputs, batch) for batch in range(len(BATCHES))]
    moves = examples["even_columns"].EvenColumns(power=1.0).run(block, inputs)
    assert len(moves) == 2
    for move in moves:
        norm = move.norm(block)
        for name, factor in move.columns(block, norm).items():
            block.get_parameter(name).mul_(factor)
        for name, value in norm.items():
            block.get_parameter(name).copy_(value)
        weights = [block.get_submodule(name).weight for name in move.fold.consumers]
        largest = torch.cat(weights).abs().amax(dim=0)
        assert float(largest.max() / largest.min()) == pytest.approx(1, abs=1e-5)
    for batch, output in enumerate(before):
        after = run_block(block, inputs, batch)
        assert float((after - output).norm() / output.norm()) < 1e-5


@torch.no_grad()
def test_the_tune_step_finds_the_factor_and_leaves_the_block(examples):
    model = WholeModel(ARCHITECTURES["llama"].build())
    inputs = capture_inputs(model, BATCHES)[0]
    block = model.blocks[0]
    teacher = [run_block(block, inputs, batch) for batch in range(len(BATCHES))]
    norms = {name: p for name, p in block.named_parameters() if p.ndim == 1}
    for norm in norms.values():
        norm.div_(1.05)  # what the best factor undoes
    state = {name: p.clone() for name, p in block.named_parameters()}
    step = examples["rescale_norms"].RescaleNorms(step=0.05)
    found = step.run(Window(block, inputs, teacher, len(BATCHES)))
    assert found.report == {"factor": 1.05}
    assert set(found.changed) == set(norms)
    for name, norm in norms.items():
        assert found.changed[name].numpy() == pytest.approx(1.05 * norm.numpy())
    assert all(torch.equal(p, state[name]) for name, p in block.named_parameters())
