"""HQQ, which needs no calibration.

    pip install hqq
    python examples/peers/with_hqq.py TARGET --bits 3 [WORDS]

WORDS are those of the command line that name the model: model=...
"""

from __future__ import annotations

import argparse
import sys

import torch
from needs import missing
from transformers import AutoModelForCausalLM, AutoTokenizer

import claq_exp

try:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
except ModuleNotFoundError as error:
    sys.exit(missing(error, "pip install hqq"))


def main() -> None:
    """Quantize, and write what `save_quantized` of hqq writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    asked, words = parser.parse_known_args()

    folder = claq_exp.calibration_inputs(*words).model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    settings = BaseQuantizeConfig(nbits=asked.bits, group_size=asked.group_size, axis=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    AutoHQQHFModel.quantize_model(
        model, quant_config=settings, compute_dtype=torch.float16, device=device
    )
    AutoHQQHFModel.save_quantized(model, asked.target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(asked.target)


if __name__ == "__main__":
    main()
