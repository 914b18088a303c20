"""Times the solve of every linear layer of a model, Hessians given, and counts its forward work.

    python benchmarks/model_solve.py
    python benchmarks/model_solve.py --quick
    python benchmarks/model_solve.py model=hf model.source=FOLDER --bits 2

Arguments with = are a run's overrides; model and calibration text are fetched as for a run.  The
Hessians are those of the original model; the linears of a group are solved side by side, as in a
run.  Rules run in turn over each group, the factorization of a group's Hessian counts for both.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import torch
from common import command_line, note, parse, run_words
from torch.utils.flop_counter import FlopCounterMode

from claq_exp.allocate.survey import block_hessians
from claq_exp.compose.experiment import compose_config
from claq_exp.models.blocks import BlockInputs, capture_inputs, feed, run_block
from claq_exp.models.discover import find_waves, linear_weight
from claq_exp.models.load import load_model
from claq_exp.models.stream import WholeModel
from claq_exp.quantize.codebook import KMeans, Uniform
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Gptq
from claq_exp.run.inputs import fetch, tokenize_inputs
from claq_exp.run.solve import solve_group


def main() -> None:
    """Print seconds and ratios."""
    parser = command_line(__doc__)
    parser.add_argument("overrides", nargs="*", help="GROUP.FIELD=VALUE ...")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--windows", type=int, default=8, help="calibration windows")
    asked = parse(parser, bits=[2])
    with run_words(asked) as words:
        measure(asked, words)


@torch.inference_mode()
def measure(asked: argparse.Namespace, words: list[str]) -> None:
    """Solve every linear of the model by every rule."""
    config = compose_config(["evaluation=none", *words])
    fetched = fetch(config)
    tokens = tokenize_inputs(config, fetched.model).calibration[: asked.windows]
    loaded = load_model(fetched.model, dtype="float32", device="cpu")
    model = WholeModel(loaded, config.model.blocks)
    inputs = capture_inputs(model, list(tokens.split(4)))
    rules = {
        f"{name}, {bits} bits": Recipe(codebook, Fixed(bits), NoReservation(), Gptq())
        for bits in asked.bits
        for name, codebook in (("uniform", Uniform()), ("k-means", KMeans()))
    }
    spent: dict[str, float] = defaultdict(float)
    columns = 0
    for index, block in enumerate(model.blocks):
        if index == 0:
            passes = forward_work(block, inputs[0])
            print(f"calibration: {passes:.2f} forward passes a block")
            note(asked, what="calibration", forward_passes=passes)
        hidden, hessians = block_hessians(block, inputs[index], f"{model.path}.{index}")
        inputs[index].hidden = []
        if index + 1 < len(model.blocks):
            inputs[index + 1].hidden = hidden
        for measured in hessians:
            hessian = measured.hessian
            weights = [linear_weight(block.get_submodule(name)).detach() for name in measured.names]
            problems = [LinearProblem(weight, hessian) for weight in weights]
            columns += sum(weight.shape[1] for weight in weights)
            for rule, recipe in rules.items():
                if index == 0:
                    solve_group(
                        problems, recipe.solver.prepare(Moments(hessian)), recipe
                    )  # compiles
                started = time.perf_counter()
                prepared = recipe.solver.prepare(Moments(hessian))
                spent[f"{rule}, factorization"] += time.perf_counter() - started
                solve_group(problems, prepared, recipe)
                spent[rule] += time.perf_counter() - started
    print(f"{columns:,} columns, {torch.get_num_threads()} threads")
    for rule, seconds in spent.items():
        print(f"{rule:28s} {seconds:7.2f} s")
        note(asked, what=rule, columns=columns, seconds=seconds)
    for bits in asked.bits:
        ratio = spent[f"k-means, {bits} bits"] / spent[f"uniform, {bits} bits"]
        print(f"k-means / uniform, {bits} bits: {ratio:.2f}")
        note(asked, what="k-means / uniform", bits=bits, ratio=ratio)


def forward_work(block: torch.nn.Module, inputs: BlockInputs) -> float:
    """Return the operations of a block's calibration, in those of one full forward pass.

    A run feeds a block once for each wave of its linears, and once more for its outputs.
    """
    with FlopCounterMode(display=False) as whole:
        run_block(block, inputs, 0)
    waves = find_waves(block, inputs)
    with FlopCounterMode(display=False) as counted:
        for wave in waves:
            firsts = [block.get_submodule(group.names[0]) for group in wave]
            feed(block, inputs, 0, dict.fromkeys(firsts, lambda _: None))
        run_block(block, inputs, 0)
    return counted.get_total_flops() / whole.get_total_flops()


if __name__ == "__main__":
    main()
