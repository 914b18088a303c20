"""A tiny random Llama, a byte-level tokenizer and a text, so that nothing is fetched."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Threads cost more than they give on models this small, and pytest-xdist has a process a core.
# Read once, when torch is imported; what the tests start inherits it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pretend_device
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when transformers imports Triton

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import claq_exp.run.shape
from claq_exp.quantize.stale_kernels import drop_stale_kernels
from claq_exp.reporting import plots
from claq_exp.sources.cache import cache_folder
from claq_exp.system.resources import cores

with contextlib.suppress(ImportError):  # some checks of a GPU go without
    from hypothesis import settings

    settings.register_profile("same", derandomize=True, deadline=None)
    settings.load_profile("same")  # the same examples each time, on every machine

drop_stale_kernels()  # before a test compiles or loads one
atexit.register(gc.unfreeze)

PLOT_LAYERS = plots.plot_layers
WORDS = ["the", "a", "cat", "dog", "runs", "sees", "small", "big", "red", "house", "tree", "and"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-launch",
        action="store_true",
        help="compile every launch of every Triton kernel for every architecture",
    )


@pytest.hookimpl(optionalhook=True)  # some checks of a GPU go without pytest-xdist
def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: tests that wait for processes of their own leave a core idle."""
    return cores() + 1


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


@pytest.fixture(scope="session", autouse=True)
def known_speed() -> Iterator[None]:
    """A plan takes the machine's speed as known, for measuring it is a good part of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claq_exp.run.shape, "matmul_speed", lambda device: 1e11)
        yield


@pytest.fixture(scope="module", autouse=True)
def libraries_stay() -> None:
    """A run's search for garbage leaves out what was imported before."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def plain_pictures() -> Iterator[None]:
    """A run draws no layers.png, which takes longer than all else of a tiny one; see `drawn`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "plot_layers", lambda report, path: path.write_bytes(b""))
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw layers.png, as they do for a person."""
    monkeypatch.setattr(plots, "plot_layers", PLOT_LAYERS)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A run sets the threads of its process, and a test may."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def heeds_interruptions() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored, and tests inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let autograd begin, in a process that pretends a device, with that device there."""
    wanted = any("pretend" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not unpretended():
        with pretend_device.in_use():
            torch.ones(1, requires_grad=True).sum().backward()


def unpretended() -> str:
    """Return why no device can be pretended here, or nothing."""
    if torch.accelerator.is_available():
        return "a device that is there would be hidden by a pretended one"
    if not hasattr(torch._C, "_acc"):
        return "this release of torch has no backends in Python"
    return ""


@pytest.fixture
def pretend() -> Iterator[str]:
    """A device beside the CPU, where there is no real one: see `pretend_device`."""
    if why := unpretended():
        pytest.skip(why)
    with pretend_device.in_use() as name:
        yield name


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
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head of its own, and a vocabulary padded beyond that of its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "untied"
    model = tiny_llama(num_hidden_layers=2, tie_word_embeddings=False, vocab_size=300)
    model.save_pretrained(folder)
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
