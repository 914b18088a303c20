"""A strategy of your own: which columns get more bits.

    python examples/own_strategy.py MODEL_FOLDER TEXT_FILE

The command line takes it too, in the folder that holds this file:

    claq-exp precision.name=own_strategy:LargestColumns +precision.share=0.2
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

import claq_exp
from claq_exp.quantize.precision import Precision
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)  # a strategy is a frozen dataclass that inherits from its family's class
class LargestColumns(Precision):
    """Give 4 bits to the columns with the largest mean magnitude, and 2 bits to all others.

    share: of the columns that get 4 bits.
    """

    share: float = 0.1  # each field is a setting: +precision.share=0.2

    def plan(self, statistics: ColumnStatistics) -> torch.Tensor:
        """Return the bits of each column: [in] uint8."""
        columns = statistics.shape[1]
        bits = torch.full((columns,), 2, dtype=torch.uint8)
        largest_first = statistics.magnitude_order()  # what else there is: ColumnStatistics
        bits[largest_first[: round(self.share * columns)]] = 4
        return bits


def main(model_folder: str, text_file: str) -> None:
    """Compare this strategy with CLAQ's own, at the same nominal bits."""
    common = [
        "model=hf",
        "calibration=text",
        "calibration.windows=8",
        "calibration.seqlen=64",
        "reservation=none",  # no outliers in 16 bits: only the bits of columns differ
        "evaluation=perplexity",
        "evaluation.context=64",
        "evaluation.corpora.wikipedia.windows=8",
        "tracking=none",
    ]
    settings = {
        "model.source": model_folder,
        "calibration.path": text_file,
        "evaluation.corpora.wikipedia.path": text_file,
    }
    recipes = {
        "outlier order (CLAQ)": ["precision.target_bits=2.4"],
        # package.module:Class; a + adds a field that the default strategy does not have
        "largest columns": ["precision.name=own_strategy:LargestColumns", "+precision.share=0.2"],
    }
    for name, words in recipes.items():
        results = claq_exp.run_experiment(*common, *words, settings=settings).results
        perplexity = results["perplexity"]["wikipedia"]["quantized"]
        print(f"{name}: {results['bits']['nominal']:.2f} bits, perplexity {perplexity:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
