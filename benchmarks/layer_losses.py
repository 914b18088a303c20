"""Compares recipes by what they lose in the linears of one block of a model.

    python benchmarks/layer_losses.py --recipe solver=gptq --recipe solver=quantease precision=fixed
    python benchmarks/layer_losses.py --quick

Words with = that stand alone are overrides of every recipe; a recipe has more of its own.  The
blocks before are quantized by k-means of 2 bits under GPTQ, so that the inputs are those of a
quantized model.  Prints the relative output error tr(D H D^T) / tr(W H W^T) of the block's linears,
geometric mean, the linear bits that the block takes, and the seconds of solving, with one thread.
"""

from __future__ import annotations

import argparse
import math
import time

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
    plain = ["solver=gptq", "solver=quantease"]
    asked = parse(parser, block=1, windows=2, recipe=plain)
    with run_words(asked) as words:
        measure(asked, words)


@torch.inference_mode()
def measure(asked: argparse.Namespace, words: list[str]) -> None:
    """Solve the linears of the block by every recipe."""
    torch.set_num_threads(1)
    words = ["evaluation=none", *words]
    config = compose_config(words)
    fetched = fetch(config)
    tokens = tokenize_inputs(config, fetched.model).calibration[: asked.windows]
    model = WholeModel(
        load_model(fetched.model, dtype="float32", device="cpu"), config.model.blocks
    )
    inputs = capture_inputs(model, list(tokens.split(4)))
    for index in range(asked.block):
        block = model.blocks[index]
        inputs[index + 1].hidden = quantized_outputs(block, inputs[index])
        inputs[index].hidden = []
    block = model.blocks[asked.block]
    _, hessians = block_hessians(block, inputs[asked.block], "block")
    recipes = {
        recipe: compose_config([*words, *recipe.split()]).recipe() for recipe in asked.recipe or []
    }
    print("  output error  linear bits  seconds")
    for name, recipe in recipes.items():
        solve(block, hessians, recipe)  # compiles
        started = time.perf_counter()
        solved = solve(block, hessians, recipe)
        seconds = time.perf_counter() - started
        logs = [math.log(found.output_error) for found in solved.values()]
        error = math.exp(sum(logs) / len(logs))
        layouts = [found.quantized.layout() for found in solved.values()]
        bits = sum(own.ledger().total for own in layouts) / sum(own.weights for own in layouts)
        print(f"{error:14.6f} {bits:12.4f} {seconds:8.2f}  {name}", flush=True)
        note(asked, recipe=name, error=error, bits=bits, seconds=seconds)


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


def quantized_outputs(block: torch.nn.Module, inputs: BlockInputs) -> list[torch.Tensor]:
    """Quantize a block by `BEFORE`; return its hidden states."""
    _, hessians = block_hessians(block, inputs, "block")
    for name, solved in solve(block, hessians, BEFORE).items():
        linear_weight(block.get_submodule(name)).copy_(solved.quantized.dequantize())
    return [run_block(block, inputs, batch) for batch in range(len(inputs.hidden))]


if __name__ == "__main__":
    main()
