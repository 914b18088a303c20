"""Read where the bits of a checkpoint are, without loading the model.

    python examples/read_bits.py RUN_OR_CHECKPOINT_FOLDER

`claq-exp inspect` prints the same and more.
"""

from __future__ import annotations

import sys

from claq_exp.checkpoint.reader import read_weights
from claq_exp.checkpoint.summary import summarize
from claq_exp.run_folder.find import checkpoint_folder


def main(folder: str) -> None:
    """Print bits of three kinds, the ledger, and one layer in detail."""
    checkpoint = checkpoint_folder(folder)  # a run's folder stands for its checkpoint

    # Sizes come from the layouts in config.json.  They add up to the bytes on disk.
    summary = summarize(checkpoint)
    print(f"{summary.weights:,} quantized weights, {summary.parameters:,} parameters")
    print(
        f"nominal {summary.sizes.nominal:.2f}, linear {summary.sizes.linear:.2f}, "
        f"model {summary.sizes.model:.2f} bits per weight"
    )
    for purpose, bits in summary.sizes.ledger.as_dict().items():
        print(f"  {purpose:<20} {bits / 8:>12,.0f} bytes")

    # How many columns have which width, over all layers.
    for width, columns in summary.column_bits().items():
        print(f"{columns:,} columns of {width} bits")

    # A matrix itself: its layout says how it is stored, its payload what it stands for.
    name, payload = next(iter(read_weights(checkpoint)))
    layout = payload.layout()
    print(f"{name}: {layout.describe()}, {layout.rows} x {layout.columns}")
    for suffix, tensor in payload.pack().items():
        print(f"  {suffix:<16} {tensor.dtype} {tuple(tensor.shape)}")
    weight = payload.dequantize()  # [out, in] float32
    print(f"  {len(weight[:, 0].unique())} different values in column 0")


if __name__ == "__main__":
    main(sys.argv[1])
