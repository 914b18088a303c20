"""Time the GPU column solver on random linears of the shapes of Llama-2-7B.

    python benchmarks/gpu_solve.py --bits 2 --blocks 32

Weights are Gaussian, inputs share a few directions; one decoder block is held at a time.  Exits
with code 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import command_line, device_option, note, parse
from device_time import Stopwatch, usable, wait
from torch import Tensor

from claq_exp.quantize.allocation import ColumnPlan, MatrixPlan
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, quantize_weight
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Gptq
from claq_exp.quantize.solver.base import describe
from claq_exp.quantize.solver.columns import ColumnSystem
from claq_exp.quantize.solver.device_columns import SUB_BLOCK, quantize_group_on_device

MODEL_BLOCKS = 32
Groups = dict[str, tuple[tuple[int, ...], int]]
GROUPS: Groups = {  # linears with the same input: rows of each, columns
    "q,k,v": ((4096, 4096, 4096), 4096),
    "o": ((4096,), 4096),
    "gate,up": ((11008, 11008), 4096),
    "down": ((4096,), 11008),
}
QUICK_GROUPS: Groups = {"q,k": ((24, 16), 12)}
CHECKED = (512, 256)  # rows and columns of the comparison with the CPU
QUICK_CHECKED = (40, 16)
WORST_RATIO = 1.05  # of the layer errors of both devices, which cluster by other heuristics
QUICK_RATIO = 1.5  # chance, in so few numbers


@dataclass
class Seconds:
    """Where the time of some blocks went."""

    factorize: float = 0.0
    products: float = 0.0
    solve: float = 0.0

    @property
    def total(self) -> float:
        """Everything but the making of the problem; `products` lies inside `solve`."""
        return self.factorize + self.solve


def clock(device: torch.device, work: Callable[[], object]) -> tuple[float, object]:
    """Return (seconds with the device idle before and after, result)."""
    wait(device)
    started = time.perf_counter()
    result = work()
    wait(device)
    return time.perf_counter() - started, result


def random_hessian(columns: int, generator: torch.Generator) -> Tensor:
    """Return the Hessian of inputs with a few strong common directions: [in, in] float64."""
    tokens = 2 * columns

    def draw(rows: int, across: int) -> Tensor:
        return torch.randn(rows, across, generator=generator, device=generator.device)

    inputs = (draw(tokens, columns) + draw(tokens, 16) @ draw(16, columns)).double()
    return (2 / tokens) * (inputs.t() @ inputs)


def products(rows: int, system: ColumnSystem) -> None:
    """Do the matrix products of a solve, without its column steps."""
    factor, size = system.inverse_factor, system.block_size
    assert factor is not None
    columns = len(factor)
    work = torch.zeros(columns, rows, device=factor.device)
    errors = torch.zeros(size, rows, device=factor.device)
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        for first in range(start, stop, SUB_BLOCK):
            last = min(first + SUB_BLOCK, stop)
            if last < stop:
                passed = factor[first:last, last:stop].t()
                work[last:stop].addmm_(passed, errors[first - start : last - start], alpha=-1)
        if stop < columns:
            work[stop:].addmm_(factor[start:stop, stop:].t(), errors[: stop - start], alpha=-1)


def plan(rows: tuple[int, ...], columns: int, asked: argparse.Namespace) -> tuple[list, list]:
    """Return (column bits, reserved counts) of every linear of a group."""
    bits = [torch.full((columns,), asked.bits, dtype=torch.uint8) for _ in rows]
    return bits, [torch.full((columns,), int(asked.reserved * height)) for height in rows]


def solve_group(
    rows: tuple[int, ...],
    columns: int,
    asked: argparse.Namespace,
    generator: torch.Generator,
    spent: Seconds,
) -> None:
    """Make, factorize and solve one group; add its seconds to `spent`."""
    device = generator.device
    weights = [0.02 * torch.randn(r, columns, generator=generator, device=device) for r in rows]
    hessian = random_hessian(columns, generator)
    seconds, system = clock(device, lambda: Gptq().prepare(Moments(hessian)))
    assert isinstance(system, ColumnSystem)
    spent.factorize += seconds
    bits, counts = plan(rows, columns, asked)
    spent.solve += clock(
        device,
        lambda: quantize_group_on_device(weights, system, bits, counts, device, graph=asked.graph),
    )[0]
    spent.products += clock(device, lambda: products(sum(rows), system))[0]


def limit_seconds(asked: argparse.Namespace, groups: Groups) -> float:
    """Return the least time of one block: its operations and bytes at the device's own rates."""
    watch = Stopwatch(torch.device(asked.device), 20, asked.quick)
    bandwidth = watch.bandwidth()
    single, double = watch.operations(torch.float32), watch.operations(torch.float64)
    least = 0.0
    for rows, columns in groups.values():
        height = sum(rows)
        least += (2 / 3 + 1 / 3) * columns**3 / double
        least += height * columns**2 / single
        gathered = (SUB_BLOCK - 1) / 2
        least += columns * height * (4 * (gathered + 2) + 1) / bandwidth
    return least


def error_ratio(asked: argparse.Namespace, device: torch.device) -> float:
    """Return the layer error of the GPU's answer over that of the CPU's, on a small matrix."""
    generator = torch.Generator(device=device).manual_seed(1)
    rows, columns = QUICK_CHECKED if asked.quick else CHECKED
    weight = torch.randn(rows, columns, generator=generator, device=device)
    hessian = random_hessian(columns, generator)
    bits, counts = plan((rows,), columns, asked)
    found = quantize_group_on_device(
        [weight], Gptq().prepare(Moments(hessian)), bits, counts, device, graph=asked.graph
    )[0]
    weight, hessian = weight.cpu(), hessian.cpu()
    system = Gptq().prepare(Moments(hessian))
    problem = LinearProblem(weight, hessian)
    recipe = Recipe(KMeans(), Fixed(asked.bits), NoReservation(), Gptq())
    chosen = MatrixPlan(KMeans(), ColumnPlan(bits[0], counts[0]))
    expected = quantize_weight(problem, system, recipe, chosen)
    return describe(problem, system, found).output_error / expected.output_error


def read() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    device_option(parser)
    parser.add_argument("--bits", type=int, default=2, help="width of every column (2)")
    parser.add_argument("--blocks", type=int, default=1, help="decoder blocks to solve (1)")
    parser.add_argument("--reserved", type=float, default=0.0, help="share kept in float16 (0)")
    parser.add_argument("--graph", action="store_true", help="replay launches as a CUDA graph")
    parser.add_argument("--seed", type=int, default=0)
    return parse(parser)


def main() -> int:
    """Measure and print; return the exit code."""
    asked = read()
    if not usable(asked, "the GPU solver"):
        return 2
    device = torch.device(asked.device)
    groups = QUICK_GROUPS if asked.quick else GROUPS
    ratio = error_ratio(asked, device)
    print(f"{asked.bits} bits; layer error, GPU / CPU, of a small matrix: {ratio:.4f}")
    note(asked, what="check", bits=asked.bits, error_over_cpu=ratio)
    generator = torch.Generator(device=device).manual_seed(asked.seed)
    for rows, columns in groups.values():  # compiles the kernel for every height
        solve_group(rows, min(columns, 256), asked, generator, Seconds())
    spent = Seconds()
    for block in range(asked.blocks):
        before = spent.total
        for rows, columns in groups.values():
            solve_group(rows, columns, asked, generator, spent)
        print(f"block {block}: {spent.total - before:.3f} s", flush=True)
    report(asked, groups, spent)
    worst = QUICK_RATIO if asked.quick else WORST_RATIO
    if ratio > worst:
        print(f"layer error, GPU / CPU, is {ratio:.4f}: more than {worst}")
    return int(ratio > worst)


def report(asked: argparse.Namespace, groups: Groups, spent: Seconds) -> None:
    """Print where the time went, and how far that is from the limit."""
    steps = asked.blocks * sum(columns for _, columns in groups.values())
    in_steps = spent.solve - spent.products
    print(f"factorization {spent.factorize / asked.blocks:.3f} s per block")
    print(f"products      {spent.products / asked.blocks:.3f} s per block")
    print(
        f"column steps  {in_steps / asked.blocks:.3f} s per block, "
        f"{1e6 * in_steps / steps:.1f} us per step (results brought to the CPU included)"
    )
    mean = spent.total / asked.blocks
    print(f"{mean:.3f} s per block, {MODEL_BLOCKS * mean:.1f} s for {MODEL_BLOCKS} blocks")
    limit = limit_seconds(asked, groups)
    print(f"{mean / limit:.1f} times the limit of bytes and operations, measured on this device")
    peak = torch.cuda.max_memory_allocated() if asked.device == "cuda" else 0
    print(f"peak device memory {peak / 2**30:.1f} GiB")
    note(
        asked,
        what="block",
        bits=asked.bits,
        blocks=asked.blocks,
        seconds=mean,
        model_seconds=MODEL_BLOCKS * mean,
        factorize_s=spent.factorize / asked.blocks,
        products_s=spent.products / asked.blocks,
        step_us=1e6 * in_steps / steps,
        times_the_limit=mean / limit,
        peak_bytes=peak,
    )


if __name__ == "__main__":
    sys.exit(main())
