"""Times products with packed matrices beside torch's float32 linear layer.

    python benchmarks/packed_linear.py
    python benchmarks/packed_linear.py --shapes 4096x4096 --bits 2 4 --batches 1 --repeats 200

Random matrices with a codebook per column, at the shapes of Llama-2-7B and SmolLM2-135M; "2/4" has
half of its columns at either width and 0.5 % of its entries reserved.  All runs take turns, and the
fastest of each counts, call from Python included.  Every run goes over its own copies of the weight
in turn, so that no copy is in a core's own caches when its turn comes (`--megabytes` of copies, at
least two); a last-level cache of hundreds of megabytes, where a machine has one, stays warm.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from common import command_line, note, parse
from torch import Tensor
from torch.nn.functional import linear

from claq_exp.payload import ColumnCodebooks, operand_of
from claq_exp.payload.columns import Reserved
from claq_exp.payload.operand import Operand
from claq_exp.runtime.kernels import KERNEL

SHAPES = (
    *("4096x4096", "11008x4096", "4096x11008"),
    *("576x576", "1536x576", "576x1536", "192x576"),
)
RESERVED = 0.005  # of the entries of a mix of widths


def main() -> None:
    """Print one row per shape, bits, batch and kernel."""
    parser = command_line(__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="ROWSxCOLUMNS ...")
    parser.add_argument("--bits", nargs="+", default=["2", "3", "4", "2/4"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--kernels", nargs="+", default=["cpu"], choices=KERNEL)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--megabytes", type=int, default=64, help="of copies of each weight")
    quick = {"shapes": ["48x32"], "bits": ["2", "2/4"], "batches": [1]}
    arguments = parse(parser, **quick, repeats=1, megabytes=0, kernels=["reference"])
    torch.set_num_threads(arguments.threads)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        "shape        bits  batch kernel       torch, us   packed, us  torch/packed  "
        "torch, MB  packed, MB  torch, GB/s  packed, GB/s"
    )
    for shape, bits in itertools.product(arguments.shapes, arguments.bits):
        rows, columns = (int(side) for side in shape.split("x"))
        operands = packed_copies(rows, columns, bits, arguments.megabytes)
        dense = copies(torch.randn(rows, columns), arguments.megabytes)
        read = {name: bytes_read(operands[0]) for name in arguments.kernels}
        for batch in arguments.batches:
            inputs = torch.randn(batch, columns)
            runs = [rotate(lambda weight, x=inputs: linear(x, weight), dense)]
            runs += [rotate(product(name, operands[0], inputs), operands) for name in read]
            torchs, *ours = fastest(runs, arguments.repeats)
            for (name, size), seconds in zip(read.items(), ours, strict=True):
                print(
                    f"{shape:12s} {bits:5s} {batch:5d} {name:10s} {torchs * 1e6:11.1f} "
                    f"{seconds * 1e6:12.1f} {torchs / seconds:13.2f} {rows * columns * 4e-6:10.2f} "
                    f"{size * 1e-6:11.2f} {rows * columns * 4e-9 / torchs:12.1f} "
                    f"{size * 1e-9 / seconds:13.1f}",
                    flush=True,
                )
                note(
                    arguments,
                    shape=shape,
                    bits=bits,
                    batch=batch,
                    kernel=name,
                    torch_us=torchs * 1e6,
                    packed_us=seconds * 1e6,
                    ratio=torchs / seconds,
                    packed_bytes=size,
                )


def packed_copies(rows: int, columns: int, bits: str, megabytes: int) -> list[Operand]:
    """Return copies of a random packed matrix; bits as of `packed_weight`."""
    weight = packed_weight(rows, columns, bits)
    operand = operand_of(weight.layout(), weight.pack())
    size = sum(part.codes.numel() for part in operand.parts)
    return [copy_of(operand) for _ in range(count(size, megabytes))]


def packed_weight(rows: int, columns: int, bits: str) -> ColumnCodebooks:
    """Return a random packed matrix; `bits` are widths with slashes between them."""
    generator = torch.Generator().manual_seed(0)
    widths = torch.tensor([int(width) for width in bits.split("/")], dtype=torch.uint8)
    column_bits = widths[torch.randint(len(widths), (columns,), generator=generator)]
    codes = torch.rand(rows, columns, generator=generator) * 2.0 ** column_bits.float()
    codes = codes.to(torch.uint8)
    mask = torch.rand(rows, columns, generator=generator) < RESERVED * (len(widths) > 1)
    codes[mask] = 0
    values = torch.randn(columns, 2 ** int(widths.max()), generator=generator).half()
    places = torch.nonzero(mask.t())[:, 1]
    reserved = Reserved(mask.sum(0), places, torch.randn(len(places), generator=generator).half())
    return ColumnCodebooks(codes, column_bits, reserved, values)


def copy_of(operand: Operand) -> Operand:
    """Return an operand with codes and levels of its own."""
    parts = tuple(
        replace(part, codes=part.codes.clone(), levels=part.levels.clone())
        for part in operand.parts
        if part.levels is not None
    )
    return replace(operand, parts=parts)


def copies(weight: Tensor, megabytes: int) -> list[Tensor]:
    """Return copies of a dense weight."""
    return [weight.clone() for _ in range(count(weight.numel() * 4, megabytes))]


def count(size: int, megabytes: int) -> int:
    """Return how many copies of `size` bytes make `megabytes`."""
    return max(2, megabytes * 1_000_000 // size)


def bytes_read(operand: Operand) -> int:
    """Return the least bytes that a product reads: codes, and everything else once as decoded."""
    total = 0
    for part in operand.parts:
        total += part.codes.numel()
        total += 0 if part.levels is None else part.levels.numel() * 4
    return total + 8 * len(operand.reserved_values)  # a value and a position


def product(name: str, operand: Operand, inputs: Tensor) -> Callable[[Operand], Tensor]:
    """Return a kernel's product with the inputs."""
    kernel = KERNEL[name]()
    if refusal := kernel.refusal(operand):
        raise SystemExit(f"{name}: {refusal}")
    return lambda copy: kernel.multiply(copy, inputs)


def rotate(run: Callable[..., Tensor], weights: list) -> Callable[[], Tensor]:
    """Return the run over one weight after the other."""
    for weight in weights:
        run(weight)  # compiles, prepares, and maps memory
    turn = itertools.cycle(weights)
    return lambda: run(next(turn))


def fastest(runs: list[Callable[[], Tensor]], repeats: int) -> list[float]:
    """Return the least seconds of each, run in turn."""
    least = [float("inf")] * len(runs)
    for _ in range(repeats):
        for at, run in enumerate(runs):
            started = time.perf_counter()
            run()
            least[at] = min(least[at], time.perf_counter() - started)
    return least


if __name__ == "__main__":
    main()
