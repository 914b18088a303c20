"""Times the column loop with k-means codebooks beside the same loop with a uniform grid.

    python benchmarks/column_loop.py
    python benchmarks/column_loop.py --shapes 4096x4096 --bits 4 --repeats 1

Random heavy-tailed weights and correlated inputs at the shapes of SmolLM2-135M and Llama-2-7B.  The
two loops run in turn and the fastest of each counts.  scikit-learn's KMeans(n_init=1) is timed on
some columns of the same matrix and multiplied up, for in full it would take hours: in the same
loop, and the fit of a column alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from common import command_line, note, parse

from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook import Codebook, KMeans, SklearnKMeans, Uniform
from claq_exp.quantize.codebook.clustering import fit_levels
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.solver import Gptq
from claq_exp.quantize.solver.columns import ColumnSystem, quantize_columns
from claq_exp.quantize.statistics import ColumnStatistics

SHAPES = ("576x576", "192x576", "1536x576", "576x1536", "4096x4096", "11008x4096", "4096x11008")
SAMPLED = 24  # columns that scikit-learn is timed on


def main() -> None:
    """Print one row per shape and width."""
    parser = command_line(__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="ROWSxCOLUMNS ...")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parse(parser, shapes=["48x32"], bits=[2], repeats=1)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("shape        bits  uniform, s  k-means, s  k-means/uniform  sklearn/k-means  fit alone")
    for shape in arguments.shapes:
        rows, columns = (int(side) for side in shape.split("x"))
        weight, hessian = heavy_tailed(rows, columns)
        system = Gptq().prepare(Moments(hessian))
        for bits in arguments.bits:
            loops = [loop(rule, weight, system, bits) for rule in (Uniform(), KMeans())]
            for run in loops:
                run()  # compiles, and fills caches
            uniform, kmeans = fastest(loops, arguments.repeats)
            theirs, ours = fit_seconds(weight, bits)
            print(
                f"{shape:12s} {bits:4d} {uniform:11.3f} {kmeans:11.3f} {kmeans / uniform:16.2f} "
                f"{(uniform + columns * theirs) / kmeans:16.0f} {theirs / ours:10.0f}",
                flush=True,
            )
            note(
                arguments,
                shape=shape,
                bits=bits,
                uniform_s=uniform,
                kmeans_s=kmeans,
                ratio=kmeans / uniform,
                sklearn_ratio=(uniform + columns * theirs) / kmeans,
                fit_ratio=theirs / ours,
            )


def heavy_tailed(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a heavy-tailed weight and a Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    weight /= torch.rand(rows, columns, generator=generator).clamp(min=0.02).pow(0.2)
    inputs = torch.randn(2 * columns, 64, generator=generator)
    inputs = inputs @ torch.randn(64, columns, generator=generator)
    inputs += torch.randn(2 * columns, columns, generator=generator)
    return weight, (inputs.t() @ inputs).double().mul_(2 / len(inputs))


def loop(
    codebook: Codebook, weight: torch.Tensor, system: ColumnSystem, bits: int
) -> Callable[[], None]:
    """Return the loop over all columns with one codebook, as a run does it for a single linear."""
    columns = weight.shape[1]
    plan = ColumnPlan(
        torch.full((columns,), bits, dtype=torch.uint8), torch.zeros(columns, dtype=torch.int64)
    )
    statistics = ColumnStatistics(weight, system.distortion_weight, system.order)

    def run() -> None:
        quantize_columns(weight, system, codebook.start(statistics, plan))

    return run


def fastest(runs: list[Callable[[], None]], repeats: int) -> list[float]:
    """Return the least seconds of each, run in turn."""
    least = [float("inf")] * len(runs)
    for _ in range(repeats):
        for at, run in enumerate(runs):
            started = time.perf_counter()
            run()
            least[at] = min(least[at], time.perf_counter() - started)
    return least


def fit_seconds(weight: torch.Tensor, bits: int) -> tuple[float, float]:
    """Return the seconds that scikit-learn and our fit take for a column's k-means."""
    picked = weight[:, :SAMPLED].contiguous()
    plan = ColumnPlan(
        torch.full((SAMPLED,), bits, dtype=torch.uint8), torch.zeros(SAMPLED, dtype=torch.int64)
    )
    statistics = ColumnStatistics(picked, torch.ones(SAMPLED), torch.arange(SAMPLED))
    quantizer = SklearnKMeans().start(statistics, plan)
    values = picked.t().contiguous().numpy()
    weights, levels = np.ones(len(picked), dtype=np.float32), np.empty(2**bits)

    def theirs() -> None:
        for column in range(SAMPLED):
            quantizer.quantize(column, values[column], plan.reserved_counts[:0].numpy())

    def ours() -> None:
        for column in values:
            fit_levels(column, weights, levels)

    fits = [theirs, ours]
    fastest(fits, 1)  # compiles and imports
    slow, fast = fastest(fits, 2)
    return slow / SAMPLED, fast / SAMPLED


if __name__ == "__main__":
    main()
