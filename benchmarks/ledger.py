"""Prints what recipes store per weight in a Llama-2-7B, beside the bits they are known by.

    python benchmarks/ledger.py
    python benchmarks/ledger.py --recipes claq_2.12

No model is read: plans depend on the shapes of the matrices alone.  For recipes of the reference
code, whose reserved share depends on the weights, the lower and the upper end are given.
"""

from __future__ import annotations

from dataclasses import replace

from common import command_line, note, parse

from claq_exp.compose.experiment import compose_config
from claq_exp.payload.base import Layout
from claq_exp.payload.stored import Ledger
from claq_exp.quantize.recipe import planned_layouts

SHAPES = {
    **{name: (4096, 4096) for name in ("q", "k", "v", "o")},
    **{name: (11008, 4096) for name in ("gate", "up")},
    "down": (4096, 11008),
}
RECIPES = {
    "kmeans_2bit": 2.0,
    "kmeans_3bit": 3.0,
    "kmeans_4bit": 4.0,
    "ap_2.1": 2.1,
    "or_2.07": 2.07,
    "or_2.14": 2.14,
    "claq_2.12": 2.12,
    "claq_2.24": 2.24,
    "claq_3.12": 3.12,
    "claq_3.23": 3.23,
    "claq_reference/2.12": 2.12,
    "claq_reference/3.12": 3.12,
    "gptq_2bit_g64": 2.0,
    "gptq_2bit_g128": 2.0,
    "gptq_3bit_g128": 3.0,
    "gptq_4bit_g128": 4.0,
}


def main() -> None:
    """Print one row per recipe, in Markdown."""
    parser = command_line(__doc__)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    asked = parse(parser, recipes=["claq_reference/2.12"])
    print("| recipe | called | nominal | codes | codebooks, scales | reserved | linear |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in asked.recipes:
        recipe = compose_config([f"experiment={name}"]).recipe()
        ends = [recipe]
        if name.startswith("claq_reference/"):  # every column at the low rate, or at the high one
            ends.insert(0, replace(recipe, reservation=replace(recipe.reservation, block=0)))
        rows = [account(list(planned_layouts(end, SHAPES).values())) for end in ends]
        cells = ["-".join(dict.fromkeys(cell)) for cell in zip(*rows, strict=True)]
        print(f"| {name} | {RECIPES[name]:.2f} | {' | '.join(cells)} |")
        note(asked, recipe=name, called=RECIPES[name], linear=float(rows[-1][-1]))


def account(layouts: list[Layout]) -> list[str]:
    """Return nominal, code, codebook, reserved and linear bits per weight as text."""
    weights = sum(layout.weights for layout in layouts)
    nominal = sum(layout.nominal_bits() * layout.weights for layout in layouts) / weights
    ledger = Ledger.sum(layout.ledger() for layout in layouts)
    books = ledger.codebooks + ledger.scales + ledger.column_bits
    reserved = ledger.reserved_values + ledger.reserved_positions
    parts = [nominal * weights, ledger.codes, books, reserved, ledger.total]
    return [f"{bits / weights:.3f}" for bits in parts]


if __name__ == "__main__":
    main()
