"""A tiny random Llama, a byte-level tokenizer and a text, so that nothing is fetched."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when transformers imports Triton

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from claq_exp.machine import drop_stale_kernels
from claq_exp.sources.cache import cache_folder

drop_stale_kernels()  # before a test compiles or loads one

WORDS = ["the", "a", "cat", "dog", "runs", "sees", "small", "big", "red", "house", "tree", "and"]


@pytest.fixture(scope="session", autouse=True)
def own_cache_of_scores() -> Iterator[Path]:
    """A cache that shares what was downloaded, converted or compiled, and no scores."""
    real = cache_folder()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for kept in ("files", "models", "kernels"):
            (real / kept).mkdir(parents=True, exist_ok=True)
            Path(folder, kept).symlink_to(real / kept)
        patch.setenv("CLAQ_EXP_CACHE", folder)
        yield Path(folder)


@pytest.fixture(autouse=True)
def no_scores_of_other_tests(own_cache_of_scores: Path) -> None:
    for kept in ("originals", "tokens", "surveys"):
        shutil.rmtree(own_cache_of_scores / kept, ignore_errors=True)


@pytest.fixture
def heeds_interruptions() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored, and tests inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost more than they give on matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def device() -> str:
    """Where GPU kernels run: a GPU, or Triton's interpreter on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=alphabet[0], pad_token=alphabet[0]
    )


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random Llama whose shapes are no powers of two."""
    torch.manual_seed(seed)
    options = {
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "dtype": torch.float16,
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes})).half().eval()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama in float16, with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of about 30,000 characters."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(generator.choice(WORDS) for _ in range(7000)), encoding="utf-8")
    return path


@pytest.fixture
def tiny_run(tiny_model: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """Overrides for a whole run on the tiny model: seconds, no network, no tracking."""
    return [*tiny_words(tiny_model, text_file), f"outputs={tmp_path / 'outputs'}"]


def tiny_words(tiny_model: Path, text_file: Path) -> list[str]:
    """What makes a run tiny."""
    return [
        "model=hf",
        f"model.source={tiny_model}",
        "calibration=text",
        f"calibration.path={text_file}",
        "calibration.windows=8",
        "calibration.seqlen=64",
        "calibration.batch_size=2",
        "evaluation=perplexity",
        f"evaluation.corpora.wikipedia.path={text_file}",
        "evaluation.corpora.wikipedia.windows=6",
        "evaluation.context=64",
        "tracking=none",
    ]
