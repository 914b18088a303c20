"""Measures a packed embedding and head beside dense ones, in the same run.

    python benchmarks/packed_ends.py --threads 1
    python benchmarks/packed_ends.py --bits 8 --tokens 1 --kernel reference

A random matrix with a codebook per column, of SmolLM2-135M's shape: 49,152 tokens and 576 columns.
`lookup` is a `QuantizedEmbedding` beside torch's embedding in float16; `head` is a product beside
torch's in float32 and in float16.  All runs take turns, and the fastest of each counts, call from
Python included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import command_line, note, parse
from packed_linear import fastest, packed_weight, product
from torch import Tensor, nn
from torch.nn.functional import linear

from claq_exp.payload import ColumnCodebooks, operand_of
from claq_exp.runtime.embedding import QuantizedEmbedding
from claq_exp.runtime.kernels import KERNEL


def main() -> None:
    """Print one row per width, number of tokens and kind of work."""
    parser = command_line(__doc__)
    parser.add_argument("--shape", default="49152x576", help="TOKENSxCOLUMNS")
    parser.add_argument("--bits", nargs="+", default=["8", "6", "5", "4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512])
    parser.add_argument("--kernel", default="cpu", choices=KERNEL)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=10)
    quick = {"shape": "96x24", "bits": ["8", "5"], "tokens": [1, 5]}
    arguments = parse(parser, **quick, repeats=1, kernel="reference")
    torch.set_num_threads(arguments.threads)
    rows, columns = (int(side) for side in arguments.shape.split("x"))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.kernel}")
    print("work   bits tokens  float32, us  float16, us   packed, us  32/packed  16/packed")
    dense = torch.randn(rows, columns)
    half = dense.half()
    for bits in arguments.bits:
        weight = packed_weight(rows, columns, bits)
        for tokens in arguments.tokens:
            ids, inputs = torch.randint(rows, (tokens,)), torch.randn(tokens, columns)
            narrow = inputs.half()
            tables = [nn.Embedding.from_pretrained(table) for table in (dense, half)]
            lookup = [
                *(lambda table=table, ids=ids: table(ids) for table in tables),
                looking_up(weight, ids),
            ]
            operand = operand_of(weight.layout(), weight.pack())
            multiply = product(arguments.kernel, operand, inputs)
            head = [
                lambda inputs=inputs: linear(inputs, dense),
                lambda inputs=narrow: linear(inputs, half),
                lambda multiply=multiply, operand=operand: multiply(operand),
            ]
            for work, runs in (("lookup", lookup), ("head", head)):
                for run in runs:
                    run()  # compiles, prepares, and maps memory
                single, double, packed = fastest(runs, arguments.repeats)
                print(
                    f"{work:6s} {bits:>4s} {tokens:6d} {single * 1e6:12.1f} {double * 1e6:12.1f} "
                    f"{packed * 1e6:12.1f} {single / packed:10.2f} {double / packed:10.2f}",
                    flush=True,
                )
                note(
                    arguments,
                    work=work,
                    bits=bits,
                    tokens=tokens,
                    float32_us=single * 1e6,
                    float16_us=double * 1e6,
                    packed_us=packed * 1e6,
                )


def looking_up(weight: ColumnCodebooks, ids: Tensor) -> Callable[[], Tensor]:
    """Return what a packed embedding does for some tokens; its rows come in float16."""
    layout = weight.layout()
    table = nn.Embedding(layout.rows, layout.columns, device="meta")
    module = QuantizedEmbedding(layout, table, dtype=torch.float16)
    module.load_state_dict(weight.pack())
    return lambda: module(ids)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
