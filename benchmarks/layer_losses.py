"""Compares recipes by what they lose in the linears of one block of a model.

    python benchmarks/layer_losses.py --recipe solver=gptq --recipe solver=quantease precision=fixed
    python benchmarks/layer_losses.py --quick

Words with = that stand alone are overrides of every recipe; a recipe has more of its own.  The
blocks before are quantized by k-means of 2 bits under GPTQ, so that the inputs are those of a
quantized model.  Prints the relative output error tr(D H D^T) / tr(W H W^T) of the block's linears,
geometric mean, on the calibration text and on further windows that no recipe has seen, the linear
bits that the block takes, and the seconds of solving, with one thread.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from dataclasses import replace

import torch
from common import command_line, note, parse, run_words

from claq_exp.allocate.survey import GroupHessian, block_hessians
from claq_exp.compose.experiment import compose_config
from claq_exp.models.blocks import BlockInputs, capture_inputs, run_block
from claq_exp.models.discover import linear_weight
from claq_exp.models.load import load_model
from claq_exp.models.stream import WholeModel
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Gptq
from claq_exp.quantize.solver.base import Solved
from claq_exp.run.inputs import fetch, tokenize_inputs
from claq_exp.run.solve import solve_linears

BEFORE = Recipe(KMeans(), Fixed(2), NoReservation(), Gptq())


def main() -> None:
    """Print one row per recipe."""
    parser = command_line(__doc__)
    parser.add_argument("overrides", nargs="*", help="GROUP.FIELD=VALUE ...")
    parser.add_argument("--recipe", action="append", help="further overrides, in quotes")
    parser.add_argument("--block", type=int, default=2)
    parser.add_argument("--windows", type=int, default=16, help="calibration windows")
    parser.add_argument("--unseen", type=int, default=16, help="windows of the other text")
    plain = ["solver=gptq", "solver=quantease"]
    asked = parse(parser, block=1, windows=2, unseen=2, recipe=plain)
    with run_words(asked) as words:
        measure(asked, words)


@torch.inference_mode()
def measure(asked: argparse.Namespace, words: list[str]) -> None:
    """Solve the linears of the block by every recipe."""
    torch.set_num_threads(1)
    words = ["evaluation=none", *words]
    config = compose_config(words)
    fetched = fetch(config)
    tokens = tokenize_inputs(config, fetched.model).calibration
    if min(asked.windows, asked.unseen) < 1:
        raise SystemExit("--windows and --unseen need one window at least")
    if len(tokens) < asked.windows + asked.unseen:
        raise SystemExit(
            f"--windows and --unseen are {asked.windows + asked.unseen} together, and "
            f"calibration.windows is {len(tokens)}; raise it"
        )
    model = WholeModel(
        load_model(fetched.model, dtype="float32", device="cpu"), config.model.blocks
    )
    fitted = list(tokens[: asked.windows].split(4))
    others = list(tokens[asked.windows :][: asked.unseen].split(4))
    inputs = capture_inputs(model, [*fitted, *others])
    for index in range(asked.block):
        block = model.blocks[index]
        inputs[index + 1].hidden = quantized_outputs(block, inputs[index], len(fitted))
        inputs[index].hidden = []
    block, entering = model.blocks[asked.block], inputs[asked.block]
    hessians = hessians_of(block, entering, slice(len(fitted)))
    unseen = {
        name: measured.hessian
        for measured in hessians_of(block, entering, slice(len(fitted), None))
        for name in measured.names
    }
    recipes = {
        recipe: compose_config([*words, *recipe.split()]).recipe() for recipe in asked.recipe or []
    }
    print("  output error  unseen text  linear bits  seconds")
    for name, recipe in recipes.items():
        solve(block, hessians, recipe)  # compiles
        started = time.perf_counter()
        solved = solve(block, hessians, recipe)
        seconds = time.perf_counter() - started
        error = geometric_mean(found.output_error for found in solved.values())
        held_out = geometric_mean(
            error_on(unseen[own], linear_weight(block.get_submodule(own)), found)
            for own, found in solved.items()
        )
        layouts = [found.quantized.layout() for found in solved.values()]
        bits = sum(own.ledger().total for own in layouts) / sum(own.weights for own in layouts)
        print(f"{error:14.6f} {held_out:12.6f} {bits:12.4f} {seconds:8.2f}  {name}", flush=True)
        note(asked, recipe=name, error=error, unseen=held_out, bits=bits, seconds=seconds)


def solve(
    block: torch.nn.Module, hessians: list[GroupHessian], recipe: Recipe
) -> dict[str, Solved]:
    """Quantize the linears of a block, each by itself: name in the block -> solution."""
    found = {}
    for measured in hessians:
        weights = {
            name: linear_weight(block.get_submodule(name)).detach() for name in measured.names
        }
        solved = solve_linears(weights, Moments(measured.hessian), recipe)
        found |= {name: one for name, (one, _) in zip(weights, solved, strict=True)}
    return found


def error_on(hessian: torch.Tensor, weight: torch.Tensor, solved: Solved) -> float:
    """Return tr(D H D^T) / tr(W H W^T) for the Hessian of another text."""
    problem = LinearProblem(weight.detach(), hessian)
    return problem.error(solved.quantized.dequantize() - problem.weight) / problem.energy()


def geometric_mean(numbers: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers."""
    logs = [math.log(number) for number in numbers]
    return math.exp(sum(logs) / len(logs))


def hessians_of(block: torch.nn.Module, inputs: BlockInputs, batches: slice) -> list[GroupHessian]:
    """Return the Hessians of a block's linears over some of the batches."""
    return block_hessians(block, replace(inputs, hidden=inputs.hidden[batches]), "block")[1]


def quantized_outputs(
    block: torch.nn.Module, inputs: BlockInputs, fitted: int
) -> list[torch.Tensor]:
    """Quantize a block by `BEFORE`, on so many of the batches; return its hidden states on all."""
    for name, solved in solve(block, hessians_of(block, inputs, slice(fitted)), BEFORE).items():
        linear_weight(block.get_submodule(name)).copy_(solved.quantized.dequantize())
    return [run_block(block, inputs, batch) for batch in range(len(inputs.hidden))]


if __name__ == "__main__":
    main()
