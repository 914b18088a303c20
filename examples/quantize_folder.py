"""Quantize a model that lies in a folder, from Python.

    python examples/quantize_folder.py MODEL_FOLDER TEXT_FILE

MODEL_FOLDER is what `save_pretrained` of transformers writes: a model and its tokenizer.
TEXT_FILE is a plain text of some thousand words or more.
"""

from __future__ import annotations

import sys

from transformers import AutoTokenizer

import claq_exp


def main(model_folder: str, text_file: str) -> None:
    """Quantize to 3 bits, print what it cost, and let the result write a few words."""
    # Words are those of the command line.  `settings` takes any value, and needs no quotes for
    # paths with spaces or commas.
    outcome = claq_exp.run_experiment(
        "model=hf",  # any causal language model: of the hub, or a folder
        "calibration=text",  # any text file
        "calibration.windows=8",  # few and short, to be quick; 128 x 2048 is usual
        "calibration.seqlen=64",
        "precision.target_bits=3",
        "evaluation=perplexity",
        "evaluation.context=64",
        "evaluation.corpora.wikipedia.windows=8",
        "tracking=none",
        settings={
            "model.source": model_folder,
            "calibration.path": text_file,
            "evaluation.corpora.wikipedia.path": text_file,  # a real test uses another text
        },
    )

    # The same call again finds the finished run; after a crash it goes on where the run stopped.
    print("run folder:", outcome.folder, "(found)" if outcome.found else "(new)")

    # `results` is the content of results.json.
    bits = outcome.results["bits"]
    perplexity = outcome.results["perplexity"]["wikipedia"]
    print(f"stored bits per weight of the linear layers: {bits['linear']:.2f}")
    print(f"perplexity: {perplexity['original']:.2f} -> {perplexity['quantized']:.2f}")

    # The checkpoint is a model of transformers whose linear layers stay packed.
    model = claq_exp.load(outcome.folder)
    tokenizer = AutoTokenizer.from_pretrained(outcome.folder / "checkpoint")
    prompt = tokenizer("the cat sees", return_tensors="pt")
    written = model.generate(prompt["input_ids"], max_new_tokens=12, do_sample=False)
    print(tokenizer.decode(written[0]))


if __name__ == "__main__":
    main(*sys.argv[1:3])
