"""Times a sweep of coordinate descent beside the column loop that it starts from.

    OMP_NUM_THREADS=1 python benchmarks/column_sweep.py
    python benchmarks/column_sweep.py --shapes 576x1536 --bits 3

The matrices are those of column_loop.py.  Loop and sweep run in turn, and the fastest of each
counts, in seconds of processor time: the loop has a thread of its own beside torch's.  A loop moves
the columns behind each column, and a sweep asks for all of them, so that it multiplies twice as
much.  The last column is the loss that the descent tells at its end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from column_loop import heavy_tailed
from common import command_line, note, parse

from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook import Codebook, KMeans, Uniform
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.solver import QuantEase
from claq_exp.quantize.solver.columns import quantize_columns
from claq_exp.quantize.solver.descent import Descent
from claq_exp.quantize.statistics import ColumnStatistics


def main() -> None:
    """Print one row per shape and codebook."""
    parser = command_line(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], help="ROWSxCOLUMNS ...")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parse(parser, shapes=["48x32"], repeats=1)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("shape        codebook  loop, s  sweep, s  sweep/loop  loss, s")
    for shape in arguments.shapes:
        rows, columns = (int(side) for side in shape.split("x"))
        for name, codebook in (("uniform", Uniform()), ("k-means", KMeans())):
            loop, sweep, loss = seconds(rows, columns, codebook, arguments)
            print(
                f"{shape:12s} {name:8s} {loop:8.3f} {sweep:9.3f} {sweep / loop:11.2f} {loss:8.3f}",
                flush=True,
            )
            note(
                arguments,
                shape=shape,
                codebook=name,
                loop_s=loop,
                sweep_s=sweep,
                ratio=sweep / loop,
                loss_s=loss,
            )


def seconds(rows: int, columns: int, codebook: Codebook, asked: argparse.Namespace) -> list[float]:
    """Return the least seconds of a loop, of a sweep and of its loss."""
    weight, hessian = heavy_tailed(rows, columns)
    system = QuantEase().prepare(Moments(hessian))
    bits = torch.full((columns,), asked.bits, dtype=torch.uint8)
    plan = ColumnPlan(bits, torch.zeros(columns, dtype=torch.int64))
    statistics = ColumnStatistics(weight, system.distortion_weight, system.order)

    def once() -> list[float]:
        quantizer, coded = codebook.start(statistics, plan), torch.empty(columns, rows)
        loop = taken(partial(quantize_columns, weight, system, quantizer, coded))
        descent = Descent(weight, system, quantizer, coded, statistics.importance())
        return [loop, taken(descent.sweep), taken(descent.loss)]

    once()  # compiles
    return [min(times) for times in zip(*(once() for _ in range(asked.repeats)), strict=True)]


def taken(run: Callable[[], object]) -> float:
    """Return the seconds of processor time that something takes."""
    started = time.process_time()
    run()
    return time.process_time() - started


if __name__ == "__main__":
    main()
