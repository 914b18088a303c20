"""Time the rounding of activations to block formats on a GPU beside a bfloat16 matrix product.

    python benchmarks/gpu_rounding.py --rounds 50

Activations are bfloat16 [2048, 4096], the product is that with [4096, 4096]; codebooks are random.
"Kernel" is the Triton kernel alone, "whole" also finds maxima, scales and steps.  What is timed is
recorded as a CUDA graph, and the L2 cache is overwritten before each replay.  Exits with code 2
where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys

import torch
from common import command_line, device_option, note, parse
from device_time import Stopwatch, usable
from torch import Tensor

from claq_exp.number_formats.encoding import array_maxima, round_values
from claq_exp.number_formats.formats import BlockFormat
from claq_exp.number_formats.search import round_numbers
from claq_exp.number_formats.table import FormatCodebooks

ROWS, COLUMNS = 2048, 4096
QUICK_FORMATS = ("2 codebooks", "e2m1, arrays of 16")


def learned(codebooks: int) -> FormatCodebooks:
    """Return random codebooks of 16 integers of 6 bits, for blocks of 8 and arrays of 64."""
    books = torch.stack([torch.randperm(63)[:16].sort().values for _ in range(codebooks)])
    block_format = BlockFormat(4, 64, "e4m3", "learned", 8, codebooks, 6)
    return FormatCodebooks(block_format, books.float() - 31)


def grids() -> dict[str, FormatCodebooks]:
    """Return what is timed, by name."""
    fixed = {
        "e2m1, arrays of 16": BlockFormat(4, 16, "e4m3", "e2m1"),
        "e2m1, arrays of 32": BlockFormat(4, 32, "e8m0", "e2m1"),
        "4-bit integers, arrays of 128": BlockFormat(4, 128, "float16", "integer"),
        "8-bit integers, whole rows": BlockFormat(8, 0, "outer", "integer"),
    }
    return {
        **{f"{count} codebooks": learned(count) for count in (2, 4, 8, 16)},
        **{name: FormatCodebooks.fixed(block_format) for name, block_format in fixed.items()},
    }


def steps_of(values: Tensor, grid: FormatCodebooks) -> Tensor:
    """Return what codewords are multiplied by: [rows, arrays] float32."""
    maxima, rule, top = array_maxima(values, grid.format.array), grid.format.rule, grid.format.top
    outer = maxima.amax(dim=1, keepdim=True)
    return rule.read(rule.find(maxima, outer, top), outer, top)


def compare(asked: argparse.Namespace) -> None:
    """Print a line for every format."""
    device = torch.device(asked.device)
    watch = Stopwatch(device, asked.rounds, asked.quick)
    device_rate = watch.bandwidth()
    rows, columns = asked.rows, asked.columns
    values = torch.randn(rows, columns, device=device).bfloat16()
    linear = torch.nn.Linear(columns, columns, bias=False, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        _, product = watch.microseconds(lambda: linear(values))
    print(f"copy: {1e-9 * device_rate:.0f} GB/s; product: {product:.1f} us")
    print("format: kernel us fastest/median, GB/s, share of a copy's; whole us, share of product")
    for name, grid in grids().items():
        if asked.quick and name not in QUICK_FORMATS:
            continue
        steps = steps_of(values, grid)
        fastest, median = watch.microseconds(lambda: round_numbers(values, steps, grid))  # noqa: B023
        _, whole = watch.microseconds(lambda: round_values(values, grid))  # noqa: B023
        rate = (2 * values.nbytes + steps.nbytes) / (1e-6 * fastest)
        print(
            f"{name:30} {fastest:7.1f}/{median:7.1f} {1e-9 * rate:6.0f} {rate / device_rate:5.0%} "
            f"{whole:7.1f} {whole / product:5.0%}",
            flush=True,
        )
        note(
            asked,
            format=name,
            kernel_us=median,
            bandwidth_share=rate / device_rate,
            whole_us=whole,
            product_us=product,
            over_bf16_product=whole / product,
        )


def main() -> int:
    """Measure and print; return the exit code."""
    parser = command_line(__doc__)
    device_option(parser)
    parser.add_argument("--rounds", type=int, default=50, help="replays of each work (50)")
    parser.add_argument("--rows", type=int, default=ROWS, help="tokens (2048)")
    parser.add_argument("--columns", type=int, default=COLUMNS, help="of the activations (4096)")
    asked = parse(parser, rounds=1, rows=2, columns=128)
    if not usable(asked, "rounding"):
        return 2
    compare(asked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
