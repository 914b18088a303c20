"""A tiny random Llama, a tokenizer of bytes and a text, so that a benchmark can run on nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

WORDS = ("the", "cat", "sees", "a", "red", "house", "and", "a", "tree")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=alphabet[0])


def write_text(path: Path, words: int = 7000) -> None:
    """Write random words, always the same."""
    chance = random.Random(0)
    path.write_text(" ".join(chance.choice(WORDS) for _ in range(words)), encoding="utf-8")


def write_tiny_model(folder: Path, **changes: Any) -> None:
    """Write a random Llama in float16 with its tokenizer; `changes` go into its config."""
    disable_progress_bar()
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "dtype": torch.float16,
    }
    LlamaForCausalLM(LlamaConfig(**{**options, **changes})).half().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def tiny_words(folder: Path, *, evaluated: bool) -> list[str]:
    """Write model and text into a folder, and return the overrides of a run on them.

    evaluated: the run has `evaluation=perplexity`.
    """
    write_tiny_model(folder / "model")
    write_text(folder / "words.txt")
    corpus = [f"evaluation.corpora.wikipedia.path={folder / 'words.txt'}", "evaluation.context=64"]
    return [
        *(corpus if evaluated else ()),
        *("model=hf", f"model.source={folder / 'model'}", "tracking=none", "calibration=text"),
        *(f"calibration.path={folder / 'words.txt'}", "calibration.batch_size=2"),
        *("calibration.windows=8", "calibration.seqlen=64"),
    ]
