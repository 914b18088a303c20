"""Time products with packed matrices on a GPU beside those of bfloat16 linears.

    python benchmarks/gpu_linear.py --rounds 50
    python benchmarks/gpu_linear.py --tune claq_exp/runtime/kernels/tuning.json
    python benchmarks/gpu_linear.py --tune FILE --seconds 60
    python benchmarks/gpu_linear.py --tuning FILE

Shapes are those of Llama-2-7B and 70B; codes are random.  A product is recorded as a CUDA graph,
and the L2 cache is overwritten before each replay.  Shares are those of a large copy and of a large
bfloat16 product on the same device.  Exits with code 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import command_line, device_option, note, parse
from device_time import Stopwatch, usable

from claq_exp.payload.operand import Operand, Part
from claq_exp.payload.stored import packed_bytes
from claq_exp.runtime.kernels.triton import (
    JOINED,
    TritonKernel,
    Tuning,
    default_tuning,
    dense_rows,
    family_of,
    size_class,
)

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
CHECKED_SHAPE = (4096, 1024)
QUICK_SHAPE = (64, 32)
WORST_ERROR = 1e-4  # of a float32 product, over its largest entry
TRIALS: dict[str, dict[str, tuple[int, ...]]] = {
    "joint": {"lanes": (4, 8, 16), "runs": (1, 2), "unroll": (1, 2, 4), "programs": (2, 4, 8)},
    "lookups": {"lanes": (4, 8, 16), "unroll": (1, 2, 4), "programs": (2, 4, 8)},
    "tiles": {"lanes": (16, 32), "warps": (4, 8, 16), "unroll": (1, 2), "programs": (1, 2, 4)},
}


def random_operand(
    device: torch.device, rows: int, columns: int, widths: tuple[int, ...], reserved: float
) -> Operand:
    """Return a matrix of random codes and levels, its columns dealt out to the widths in turn."""
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


def difference(device: torch.device, tuning: Tuning, shape: tuple[int, int]) -> float:
    """Return the largest error of a product over its largest entry, against float64."""
    operand = random_operand(device, *shape, (2, 4), 0.0)
    dense = dense_rows(operand, torch.float32, 0, operand.rows).double()
    worst = 0.0
    for n in BATCHES:
        inputs = torch.randn(n, operand.columns, device=device)
        expected = inputs.double() @ dense.t()
        error = TritonKernel(tuning).multiply(operand, inputs).double() - expected
        worst = max(worst, float(error.abs().max() / expected.abs().max()))
    return worst


def compare(asked: argparse.Namespace, watch: Stopwatch, tuning: Tuning) -> int:
    """Print a line for every shape, form and batch; return 1 where products are wrong."""
    device = watch.device
    rates = watch.bandwidth(), watch.operations(torch.bfloat16)
    print(f"copy: {1e-12 * rates[0]:.2f} TB/s; bfloat16 product: {1e-12 * rates[1]:.0f} TFLOP/s")
    error = difference(device, tuning, QUICK_SHAPE if asked.quick else CHECKED_SHAPE)
    print(f"largest error over largest output, float32: {error:.1e}")
    note(asked, what="check", error=error)
    print(
        "rows x columns, form, batch: bfloat16 us fastest/median, packed us, ratio, MB, "
        "share of the copy, share of the product"
    )
    for rows, columns in [QUICK_SHAPE] if asked.quick else SHAPES:
        linear = torch.nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16)
        kernel = TritonKernel(tuning)
        operands = {
            form: random_operand(
                device, rows, columns, widths, RESERVED if len(widths) > 1 else 0.0
            )
            for form, widths in FORMS.items()
        }
        for n in asked.batches:
            inputs = torch.randn(n, columns, device=device, dtype=torch.bfloat16)
            with torch.no_grad():
                dense = watch.microseconds(lambda: linear(inputs))  # noqa: B023
            for form, operand in operands.items():
                ours = watch.microseconds(lambda: kernel.multiply(operand, inputs))  # noqa: B023
                size = least_bytes(operand, n)
                seconds = 1e-6 * ours[0]
                shares = (
                    size / seconds / rates[0],
                    2 * n * rows * columns / seconds / rates[1],
                )
                print(
                    f"{rows:5} x {columns:5}, {form:24}, {n:2}: "
                    f"{dense[0]:7.1f}/{dense[1]:7.1f} {ours[0]:7.1f}/{ours[1]:7.1f} "
                    f"{dense[1] / ours[1]:5.2f} {1e-6 * size:7.1f} "
                    f"{shares[0]:5.0%} {shares[1]:5.0%}",
                    flush=True,
                )
                note(
                    asked,
                    what="product",
                    shape=f"{rows}x{columns}",
                    form=form,
                    batch=n,
                    bf16_us=dense[1],
                    packed_us=ours[1],
                    over_bf16=dense[1] / ours[1],
                    bandwidth_share=shares[0],
                    operations_share=shares[1],
                )
    if error > WORST_ERROR:
        print(f"products are off by {error:.1e} of the largest: more than {WORST_ERROR:.0e}")
    return int(error > WORST_ERROR)


def trials(family: str) -> Iterator[dict[str, int]]:
    """Return the launch configurations to try, the present default first."""
    options = TRIALS[family]
    present = {key: default_tuning()[family]["default"][key] for key in options}
    yield present
    others = [
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    ]
    random.Random(0).shuffle(others)  # a search that is cut short has seen some of everything
    yield from (other for other in others if other != present)


def fastest_configuration(
    family: str, operand: Operand, n: int, watch: Stopwatch, ends: float
) -> tuple[float, dict[str, int], int]:
    """Return (median microseconds, configuration, how many were tried) of the fastest.

    ends: no trial but the first begins after it.  Outputs are not checked.
    """
    from triton.errors import TritonError  # too few registers or too little shared memory, say

    inputs = torch.randn(n, operand.columns, device=watch.device, dtype=torch.bfloat16)
    best: tuple[float, dict[str, int]] | None = None
    tried = 0
    for chosen in trials(family):
        if best is not None and time.monotonic() > ends:
            break
        kernel = TritonKernel({**default_tuning(), family: {"default": chosen}})
        try:
            _, spent = watch.microseconds(lambda: kernel.multiply(operand, inputs))  # noqa: B023
        except TritonError as error:
            print(f"{family}, {chosen}: {type(error).__name__}", flush=True)
            continue
        finally:
            tried += 1
        if best is None or spent < best[0]:
            best = spent, chosen
    if best is None:
        raise RuntimeError(f"no configuration of {family} fits this GPU")
    return *best, tried


def tuned_products(widths: list[int], quick: bool) -> Iterator[tuple[str, int, int, int, int]]:
    """Yield (family, width, inputs, rows, columns) of each product with an entry of its own."""
    for width, n in itertools.product(widths, (1, 4, 16)):
        family = family_of(width, n)
        repeated = family == "lookups" and n == 4 and width not in JOINED
        if not repeated and not (family == "tiles" and n < 16):
            for shape in [QUICK_SHAPE] if quick else TUNED_SHAPES:
                yield family, width, n, *shape


def tune(asked: argparse.Namespace, watch: Stopwatch) -> None:
    """Write the fastest configurations to a file; what is not tried stays as it is.

    Every product gets an equal part of the time that is left.
    """
    found: dict[str, Any] = json.loads(json.dumps(default_tuning()))
    ends = time.monotonic() + asked.seconds
    products = list(tuned_products(asked.widths, asked.quick))
    for done, (family, width, n, rows, columns) in enumerate(products):
        now = time.monotonic()
        until = now + (ends - now) / (len(products) - done)
        operand = random_operand(watch.device, rows, columns, (width,), 0.0)
        spent, chosen, tried = fastest_configuration(family, operand, n, watch, until)
        size = size_class(rows * columns)
        found[family].setdefault(str(width), {})[size] = chosen
        every = sum(1 for _ in trials(family))
        print(
            f"{family}, {width} bits, {size}: {chosen}, {spent:.1f} us, {tried} of {every} tried",
            flush=True,
        )
        named = {f"chosen_{key}": value for key, value in chosen.items()}
        note(asked, what="tuned", family=family, width=width, size=size, us=spent, **named)
        asked.tune.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def read() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    device_option(parser)
    parser.add_argument("--rounds", type=int, default=50, help="replays of each product (50)")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--tuning", type=Path, metavar="FILE", help="configurations to use")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="try configurations, write FILE")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4], help="to tune (2 3 4)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="to tune in, at most (3600)")
    return parse(parser, rounds=1, widths=[2], seconds=1.0, batches=[1])


def main() -> int:
    """Measure and print; return the exit code."""
    asked = read()
    if not usable(asked, "products"):
        return 2
    watch = Stopwatch(torch.device(asked.device), asked.rounds, asked.quick)
    if asked.tune is not None:
        tune(asked, watch)
    else:
        tuning = json.loads(asked.tuning.read_text()) if asked.tuning else default_tuning()
        return compare(asked, watch, tuning)
    return 0


if __name__ == "__main__":
    sys.exit(main())
