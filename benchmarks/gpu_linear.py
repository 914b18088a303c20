"""Time products with packed matrices on a GPU beside those of bfloat16 linears.

    python benchmarks/gpu_linear.py --rounds 50
    python benchmarks/gpu_linear.py --tune claq_exp/runtime/kernels/tuning.json

Shapes are those of Llama-2-7B and 70B; codes are random.  A product is recorded as a CUDA graph,
and the L2 cache is overwritten before each replay.  Exits with code 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from claq_exp.quantize.layout import packed_bytes
from claq_exp.runtime.kernels.triton import (
    JOINED,
    TritonKernel,
    default_tuning,
    dense_rows,
    family_of,
    size_class,
)
from claq_exp.runtime.operand import Operand, Part

SHAPES = (  # rows, columns
    (4096, 4096),
    (11008, 4096),
    (4096, 11008),
    (8192, 8192),
    (28672, 8192),
    (8192, 28672),
)
FORMS = {"2 bits": (2,), "4 bits": (4,), "2/4 bits, 0.5 % reserved": (2, 4)}
RESERVED = 0.005
BATCHES = (1, 4, 16)
TUNED_SHAPES = ((4096, 4096), (28672, 8192))  # one of each size class
TRIALS: dict[str, dict[str, tuple[int, ...]]] = {
    "joint": {"lanes": (4, 8, 16), "runs": (1, 2), "unroll": (1, 2, 4), "programs": (2, 4, 8)},
    "lookups": {"lanes": (4, 8, 16), "unroll": (1, 2, 4), "programs": (2, 4, 8)},
    "tiles": {"lanes": (16, 32), "warps": (4, 8, 16), "unroll": (1, 2), "programs": (1, 2, 4)},
}
COPY_BYTES = 1 << 30
FLUSH_BYTES = 1 << 28  # several times the L2 cache of a data-centre GPU


def random_operand(rows: int, columns: int, widths: tuple[int, ...], reserved: float) -> Operand:
    """Return a matrix of random codes and levels, its columns dealt out to the widths in turn."""
    device = torch.device("cuda")
    parts = []
    for turn, width in enumerate(widths):
        own = torch.arange(turn, columns, len(widths), device=device)
        shape = (len(own), packed_bytes(rows, width))
        codes = torch.randint(256, shape, dtype=torch.uint8, device=device)
        levels = torch.randn(len(own), 2**width, device=device).half().float()
        parts.append(Part(width, own if len(widths) > 1 else None, codes, levels))
    count = int(reserved * rows * columns)
    # An odd step has no factor in common with the usual numbers of rows: entries reach all of them.
    entries = torch.arange(count, device=device) * ((rows * columns // max(1, count) - 1) | 1)
    return Operand(
        rows=rows,
        columns=columns,
        parts=tuple(parts),
        grid=None,
        row_scales=torch.rand(rows, device=device) + 0.5,
        reserved_rows=entries % rows,
        reserved_columns=entries // rows,
        reserved_values=torch.randn(count, device=device),
        clamps=False,
    )


def least_bytes(operand: Operand, n: int) -> int:
    """Return the bytes that a product must move: the packed matrix, inputs and outputs."""
    codes = sum(part.codes.numel() for part in operand.parts)
    levels = sum(4 * part.levels.numel() for part in operand.parts if part.levels is not None)
    places = sum(4 * len(part.columns) for part in operand.parts if part.columns is not None)
    reserved = 8 * len(operand.reserved_values)
    vectors = 2 * n * (operand.rows + operand.columns) + 4 * operand.rows
    return codes + levels + places + reserved + vectors


def record(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Compile and warm up, then record one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def microseconds(work: Callable[[], object], rounds: int, flush: Tensor) -> tuple[float, float]:
    """Return (fastest, median) of `rounds` replays with a cold L2 cache."""
    graph = record(work)
    pairs = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    spent = [1e3 * begin.elapsed_time(end) for begin, end in pairs]
    return min(spent), statistics.median(spent)


def bandwidth(rounds: int, flush: Tensor) -> float:
    """Return the bytes per second of a large copy, reads and writes together."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    fastest, _ = microseconds(lambda: target.copy_(source), min(rounds, 20), flush)
    return 2 * COPY_BYTES / (1e-6 * fastest)


def difference() -> float:
    """Return the largest error of a product over its largest entry, against float64."""
    operand = random_operand(4096, 1024, (2, 4), 0.0)
    dense = dense_rows(operand, torch.float32, 0, operand.rows).double()
    worst = 0.0
    for n in BATCHES:
        inputs = torch.randn(n, operand.columns, device="cuda")
        expected = inputs.double() @ dense.t()
        error = TritonKernel().multiply(operand, inputs).double() - expected
        worst = max(worst, float(error.abs().max() / expected.abs().max()))
    return worst


def compare(rounds: int, flush: Tensor) -> None:
    """Print a line for every shape, form and batch."""
    device_rate = bandwidth(rounds, flush)
    print(f"copy of {COPY_BYTES >> 20} MiB: {1e-12 * device_rate:.2f} TB/s")
    print(f"largest error over largest output, float32: {difference():.1e}")
    print("rows x columns, form, batch: bfloat16 us fastest/median, packed us, ratio, MB, share")
    for rows, columns in SHAPES:
        linear = torch.nn.Linear(columns, rows, bias=False, device="cuda", dtype=torch.bfloat16)
        kernel = TritonKernel()
        operands = {
            form: random_operand(rows, columns, widths, RESERVED if len(widths) > 1 else 0.0)
            for form, widths in FORMS.items()
        }
        for n in BATCHES:
            inputs = torch.randn(n, columns, device="cuda", dtype=torch.bfloat16)
            dense = microseconds(lambda: linear(inputs), rounds, flush)  # noqa: B023
            for form, operand in operands.items():
                ours = microseconds(
                    lambda: kernel.multiply(operand, inputs),  # noqa: B023
                    rounds,
                    flush,
                )
                size = least_bytes(operand, n)
                print(
                    f"{rows:5} x {columns:5}, {form:24}, {n:2}: "
                    f"{dense[0]:7.1f}/{dense[1]:7.1f} {ours[0]:7.1f}/{ours[1]:7.1f} "
                    f"{dense[1] / ours[1]:5.2f} {1e-6 * size:7.1f} "
                    f"{size / (1e-6 * ours[0]) / device_rate:5.0%}",
                    flush=True,
                )


def trials(family: str) -> Iterator[dict[str, int]]:
    """Return the launch configurations to try."""
    options = TRIALS[family]
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


def fastest_configuration(
    family: str, operand: Operand, n: int, rounds: int, flush: Tensor
) -> tuple[float, dict[str, int]]:
    """Return (median microseconds, configuration) of the fastest; its outputs are not checked."""
    from triton.runtime.errors import OutOfResources

    inputs = torch.randn(n, operand.columns, device="cuda", dtype=torch.bfloat16)
    best: tuple[float, dict[str, int]] | None = None
    for chosen in trials(family):
        kernel = TritonKernel({**default_tuning(), family: {"default": chosen}})
        try:
            _, spent = microseconds(
                lambda: kernel.multiply(operand, inputs),  # noqa: B023
                rounds,
                flush,
            )
        except OutOfResources:
            continue
        if best is None or spent < best[0]:
            best = spent, chosen
    if best is None:
        raise RuntimeError(f"no configuration of {family} fits this GPU")
    return best


def tune(path: Path, widths: list[int], rounds: int, flush: Tensor) -> None:
    """Write the fastest configurations to `path`; what is not tried stays as it is."""
    found: dict[str, Any] = json.loads(json.dumps(default_tuning()))
    for width in widths:
        for n in (1, 4, 16):
            family = family_of(width, n)
            repeated = family == "lookups" and n == 4 and width not in JOINED
            if repeated or (family == "tiles" and n < 16):
                continue
            for rows, columns in TUNED_SHAPES:
                operand = random_operand(rows, columns, (width,), 0.0)
                spent, chosen = fastest_configuration(family, operand, n, rounds, flush)
                size = size_class(rows * columns)
                found[family].setdefault(str(width), {})[size] = chosen
                print(f"{family}, {width} bits, {size}: {chosen}, {spent:.1f} us", flush=True)
                path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=50, help="replays of each product (50)")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="try configurations, write FILE")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4], help="to tune (2 3 4)")
    return parser.parse_args()


def main() -> int:
    """Measure and print; return the exit code."""
    asked = parse()
    if not torch.cuda.is_available():
        print(
            "no CUDA device: this benchmark times products on a GPU; run it on a GPU",
            file=sys.stderr,
        )
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    if asked.tune is not None:
        tune(asked.tune, asked.widths, asked.rounds, flush)
    else:
        compare(asked.rounds, flush)
    return 0


if __name__ == "__main__":
    sys.exit(main())
