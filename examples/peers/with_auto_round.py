"""AutoRound on the calibration windows of a run.

    pip install auto-round
    python examples/peers/with_auto_round.py TARGET --bits 3 [--iterations 50] [WORDS]

WORDS are those of the command line: model=..., calibration=..., calibration.windows=16.
The light recipe of AutoRound is 50 iterations, learning rate 5e-3, batch 4; its default is 200
iterations and batch 8, on 128 windows of 2048 tokens.
"""

from __future__ import annotations

import argparse
import sys

import torch
from needs import missing
from transformers import AutoModelForCausalLM, AutoTokenizer

import claq_exp

try:
    from auto_round import AutoRound
except ModuleNotFoundError as error:
    sys.exit(missing(error, "pip install auto-round"))


def main() -> None:
    """Quantize, and write a checkpoint that `claq-exp evaluate checkpoint=TARGET/...` reads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument(
        "--rate", type=float, default=None, help="learning rate; its own by default"
    )
    parser.add_argument("--alg-ext", action="store_true", help="its extended search")
    parser.add_argument("--format", default="auto_round", help="auto_round, auto_gptq, auto_awq")
    asked, words = parser.parse_known_args()

    calibration = claq_exp.calibration_inputs(*words)
    model = AutoModelForCausalLM.from_pretrained(calibration.model, dtype=torch.float32)
    options = {} if asked.rate is None else {"lr": asked.rate}
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(calibration.model),
        bits=asked.bits,
        group_size=asked.group_size,
        sym=False,
        iters=asked.iterations,
        batch_size=asked.batch_size,
        nsamples=len(calibration.windows),
        seqlen=calibration.windows.shape[1],
        dataset=[window[None] for window in calibration.windows],  # a list of [1, seqlen] tokens
        enable_alg_ext=asked.alg_ext,
        enable_torch_compile=False,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        **options,
    )
    rounding.quantize_and_save(asked.target, format=asked.format)


if __name__ == "__main__":
    main()
