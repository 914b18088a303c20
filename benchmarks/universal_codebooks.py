"""Designs the codebooks that come with the package, on a mix of weights, activations and noise.

    python benchmarks/universal_codebooks.py --out claq_exp/number_formats/universal.json

A third of the blocks are of weights and a third of activations, in equal parts from each model;
a third is drawn from distributions (normal, Laplace, Student's t with 5 degrees of freedom, and
normal with a few large channels).  `--models` takes options of conf/model, or none for noise alone:
what codebooks that never saw a model do to it is then seen by `books=FILE`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from common import command_line, note, parse, run_words
from torch import Tensor

from claq_exp.compose.experiment import compose_config
from claq_exp.models.activations import observe_inputs
from claq_exp.models.discover import linears_of
from claq_exp.models.load import open_model
from claq_exp.number_formats.formats import LEARNED, BlockFormat
from claq_exp.number_formats.lo_bcq import design_codebooks, normalized_blocks
from claq_exp.number_formats.universal import DIGITS, design_name
from claq_exp.run.inputs import fetch, tokenize_inputs
from claq_exp.sources.cache import cache_folder
from claq_exp.system.files import write_bytes
from claq_exp.system.machine import versions

BITS, ARRAYS, BLOCK, CODEBOOKS = (2, 3, 4), (32, 64, 128), 8, (2, 4, 8, 16)
ROWS = 8  # of each weight
NOISE_ROWS = 256  # of each distribution
SEED = 0


def main() -> int:
    """Write the file; return 0."""
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=["smollm2_135m"], metavar="OPTION")
    parser.add_argument("--numbers", type=int, default=1 << 20, help="of each design")
    parser.add_argument("overrides", nargs="*", help="more GROUP.FIELD=VALUE of claq-exp")
    parser.add_argument("--noise", type=int, default=2048, help="columns of each distribution")
    arguments = parse(parser, models=["tiny"], numbers=3072, noise=256)
    parts: dict[str, list[Tensor]] = {"noise": noise(arguments.noise)}
    with run_words(arguments) as words:
        for name in arguments.models:
            named = [] if arguments.quick else [f"model={name}"]
            weights, activations = model_rows([*named, *words])
            parts.setdefault("weights", []).extend(weights)
            parts.setdefault("activations", []).extend(activations)
    designs = {}
    for array in ARRAYS:
        blocks = mix(parts, array, arguments.numbers // BLOCK)
        for bits in BITS:
            for codebooks in CODEBOOKS:
                block_format = lo_bcq_format(bits, array, codebooks)
                design = design_codebooks(blocks, bits, codebooks)
                name = design_name(block_format)
                designs[name] = [[round(x, DIGITS) for x in book] for book in design.codebooks]
                errors = design.errors
                print(f"{name}: error {errors[0]:.3g} to {errors[-1]:.3g}")
                note(arguments, design=name, first_error=errors[0], last_error=errors[-1])
    recipe = {
        "made by": "benchmarks/universal_codebooks.py",
        "models": arguments.models,
        "parts": sorted(parts),
        "numbers": arguments.numbers,
        "seed": SEED,
        "versions": {name: versions()[name] for name in ("torch", "numpy", "numba")},
        "sha256": hashlib.sha256(json.dumps(designs).encode()).hexdigest(),
    }
    text = ",\n".join(f"  {json.dumps(key)}: {json.dumps(designs[key])}" for key in sorted(designs))
    content = f'{{"recipe": {json.dumps(recipe)},\n"designs": {{\n{text}\n}}}}\n'
    write_bytes(arguments.out, content.encode())
    return 0


def lo_bcq_format(bits: int, array: int, codebooks: int) -> BlockFormat:
    """Return the format of a design; codewords are rounded when they are read."""
    return BlockFormat(bits, array, "e4m3", LEARNED, BLOCK, codebooks, codeword_bits=8)


def noise(columns: int) -> list[Tensor]:
    """Return rows of a few distributions: [rows, columns] each."""
    shape = (NOISE_ROWS, columns)
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spread = normal(columns).exp()  # of channels, a few of them outliers
    spread[torch.rand(columns, generator=generator) < 0.005] *= 30.0
    chi = sum(normal(*shape).square() for _ in range(5)) / 5
    exponential = [-torch.rand(*shape, generator=generator).clamp(min=1e-7).log() for _ in range(2)]
    return [
        normal(*shape),
        exponential[0] - exponential[1],
        normal(*shape) / chi.sqrt(),
        normal(*shape) * spread,
    ]


def model_rows(overrides: list[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Return rows of every linear's weight, and of what enters it."""
    config = compose_config([*overrides, "evaluation=none", "calibration.windows=4"])
    fetched = fetch(config)
    tokens = tokenize_inputs(config, fetched.model, fetched.contents)
    model = open_model(fetched.model, cache_folder() / "converted", dtype="float32", device="cpu")
    names = [
        f"{model.path}.{index}.{name}"
        for index, block in enumerate(model.blocks)
        for name in linears_of(block)
    ]
    weights = []
    for name in names:
        weight = model.read(f"{name}.weight").float()
        places = torch.linspace(0, len(weight) - 1, ROWS).round().long()
        weights.append(weight[places].clone())
    return weights, list(observe_inputs(model, [tokens.calibration], names).samples)


def mix(parts: dict[str, list[Tensor]], array: int, count: int) -> Tensor:
    """Return blocks in equal shares of each part: [count, block] float32."""
    generator = torch.Generator().manual_seed(SEED)
    block_format = lo_bcq_format(4, array, 1)
    chosen = []
    for name in sorted(parts):
        blocks = torch.cat([normalized_blocks(rows, block_format) for rows in parts[name]])
        order = torch.randperm(len(blocks), generator=generator)
        chosen.append(blocks[order[: count // len(parts)]])
    return torch.cat(chosen)


if __name__ == "__main__":
    sys.exit(main())
