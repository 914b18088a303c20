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
from torch import Tensor

from claq_exp.quantize.allocation import ColumnPlan, MatrixPlan
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, describe, quantize_weight
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Gptq
from claq_exp.quantize.solver.columns import ColumnSystem
from claq_exp.quantize.solver.device_columns import SUB_BLOCK, quantize_group_on_device

MODEL_BLOCKS = 32
GROUPS = {  # linears with the same input: rows of each, columns
    "q,k,v": ((4096, 4096, 4096), 4096),
    "o": ((4096,), 4096),
    "gate,up": ((11008, 11008), 4096),
    "down": ((4096,), 11008),
}
FLOAT32_RATE = 67e12  # float32 operations per second of an H200
FLOAT64_RATE = 67e12  # float64, by its tensor cores
BANDWIDTH = 4.8e12  # bytes per second


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


def clock(work: Callable[[], object]) -> tuple[float, object]:
    """Return (seconds with the device idle before and after, result)."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
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
    seconds, system = clock(lambda: Gptq().prepare(hessian))
    assert isinstance(system, ColumnSystem)
    spent.factorize += seconds
    bits, counts = plan(rows, columns, asked)
    spent.solve += clock(
        lambda: quantize_group_on_device(weights, system, bits, counts, device, graph=asked.graph)
    )[0]
    spent.products += clock(lambda: products(sum(rows), system))[0]


def limit_seconds() -> float:
    """Return the least time of one block: its operations and bytes at the device's full rates."""
    least = 0.0
    for rows, columns in GROUPS.values():
        height = sum(rows)
        least += (2 / 3 + 1 / 3) * columns**3 / FLOAT64_RATE
        least += height * columns**2 / FLOAT32_RATE
        gathered = (SUB_BLOCK - 1) / 2
        least += columns * height * (4 * (gathered + 2) + 1) / BANDWIDTH
    return least


def error_ratio(asked: argparse.Namespace, device: torch.device) -> float:
    """Return the layer error of the GPU's answer over that of the CPU's, on a small matrix."""
    generator = torch.Generator(device=device).manual_seed(1)
    rows, columns = (512,), 256
    weight = torch.randn(*rows, columns, generator=generator, device=device)
    hessian = random_hessian(columns, generator)
    bits, counts = plan(rows, columns, asked)
    found = quantize_group_on_device(
        [weight], Gptq().prepare(hessian), bits, counts, device, graph=asked.graph
    )[0]
    weight, hessian = weight.cpu(), hessian.cpu()
    system = Gptq().prepare(hessian)
    problem = LinearProblem(weight, hessian)
    recipe = Recipe(KMeans(), Fixed(asked.bits), NoReservation(), Gptq())
    chosen = MatrixPlan(KMeans(), ColumnPlan(bits[0], counts[0]))
    expected = quantize_weight(problem, system, recipe, chosen)
    return describe(problem, system, found).output_error / expected.output_error


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bits", type=int, default=2, help="width of every column (2)")
    parser.add_argument("--blocks", type=int, default=1, help="decoder blocks to solve (1)")
    parser.add_argument("--reserved", type=float, default=0.0, help="share kept in float16 (0)")
    parser.add_argument("--graph", action="store_true", help="replay launches as a CUDA graph")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    """Measure and print; return the exit code."""
    asked = parse()
    if not torch.cuda.is_available():
        print(
            "no CUDA device: this benchmark times the GPU solver; run it on a GPU", file=sys.stderr
        )
        return 2
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {asked.bits} bits")
    print(f"layer error, GPU / CPU, 512 x 256: {error_ratio(asked, device):.4f}")
    generator = torch.Generator(device=device).manual_seed(asked.seed)
    for rows, columns in GROUPS.values():  # compiles the kernel for every height
        solve_group(rows, min(columns, 256), asked, generator, Seconds())
    spent = Seconds()
    for block in range(asked.blocks):
        before = spent.total
        for rows, columns in GROUPS.values():
            solve_group(rows, columns, asked, generator, spent)
        print(f"block {block}: {spent.total - before:.3f} s", flush=True)
    steps = asked.blocks * sum(columns for _, columns in GROUPS.values())
    in_steps = spent.solve - spent.products
    print(f"factorization {spent.factorize / asked.blocks:.3f} s per block")
    print(f"products      {spent.products / asked.blocks:.3f} s per block")
    print(
        f"column steps  {in_steps / asked.blocks:.3f} s per block, "
        f"{1e6 * in_steps / steps:.1f} us per step (results brought to the CPU included)"
    )
    mean = spent.total / asked.blocks
    print(f"{mean:.3f} s per block, {MODEL_BLOCKS * mean:.1f} s for {MODEL_BLOCKS} blocks")
    print(f"{mean / limit_seconds():.1f} times the limit of bytes and operations of an H200")
    print(f"peak device memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
