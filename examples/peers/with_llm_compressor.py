"""GPTQ of llm-compressor on the calibration windows of a run.

    pip install --no-deps llmcompressor && pip install compressed-tensors loguru
    python examples/peers/with_llm_compressor.py TARGET --bits 4 [WORDS]

llmcompressor 0.14 asks for transformers up to 5.17, hence --no-deps.  The grid has zero points,
unless --symmetric is given.
WORDS are those of the command line: model=..., calibration=..., calibration.windows=16.
"""

from __future__ import annotations

import argparse
import sys

import torch
from needs import missing
from transformers import AutoModelForCausalLM, AutoTokenizer

import claq_exp

try:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
except ModuleNotFoundError as error:
    command = "pip install --no-deps llmcompressor && pip install compressed-tensors loguru"
    sys.exit(missing(error, command))


def main() -> None:
    """Quantize, and write a folder in the format compressed-tensors."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true", help="no zero points")
    asked, words = parser.parse_known_args()

    calibration = claq_exp.calibration_inputs(*words)
    tokenizer = AutoTokenizer.from_pretrained(calibration.model)
    model = AutoModelForCausalLM.from_pretrained(calibration.model, dtype=torch.float32)
    windows = calibration.windows.tolist()
    masks = torch.ones_like(calibration.windows).tolist()
    weights = {"num_bits": asked.bits, "type": "int", "symmetric": asked.symmetric}
    weights |= {"strategy": "group", "group_size": asked.group_size}
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict({"input_ids": windows, "attention_mask": masks}),
        recipe=GPTQModifier(
            ignore=["lm_head"],
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ),
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
    )
    model.half().save_pretrained(asked.target, save_compressed=True)
    tokenizer.save_pretrained(asked.target)


if __name__ == "__main__":
    main()
