"""Corpora and calibration texts are cut as the code behind the published tables cuts them."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from conftest import WORDS, byte_tokenizer
from transformers import Gemma2Config, LlamaConfig

from claq_exp.compose.experiment import compose_config
from claq_exp.errors import ConfigError
from claq_exp.models.bos import bos_rule
from claq_exp.models.load import load_tokenizer, tokenize
from claq_exp.run.inputs import corpus_windows, tokenize_inputs
from claq_exp.sources.text import TextSource, read_documents, read_text

SHARED = Path(__file__).resolve().parents[3] / "shared"
SEQLEN = 96
LLAMA = LlamaConfig(max_position_embeddings=4096)


def phrase(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Small files in the form of wiki.test.raw, ptb.valid.txt and a shard of C4."""
    generator = random.Random(3)
    folder = tmp_path_factory.mktemp("corpora")
    lines = [" ", " = A title = ", " "]
    lines += [f" {phrase(generator, 30)} . " if n % 3 else " " for n in range(90)]
    (folder / "wiki.raw").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    sentences = [phrase(generator, 5 + n % 9) for n in range(300)]
    (folder / "ptb.txt").write_text("".join(f" {text} \n" for text in sentences), encoding="utf-8")
    documents = [{"text": phrase(generator, 3 + n % 60), "url": "x"} for n in range(1500)]
    rows = "".join(json.dumps(row) + "\n" for row in documents).encode()
    (folder / "c4.jsonl.gz").write_bytes(gzip.compress(rows))
    return folder


def hub_rows(files: Path) -> dict[str, list[str]]:
    """The rows that the hub's data sets have of these files, by its own scripts' rules."""
    with (files / "wiki.raw").open(encoding="utf-8") as lines:
        wikitext = [line if line.strip() else "" for line in lines]
    with (files / "ptb.txt").open(encoding="utf-8") as lines:
        ptb = [line.strip() for line in lines]
    with gzip.open(files / "c4.jsonl.gz", "rt", encoding="utf-8") as lines:
        c4 = [json.loads(line)["text"] for line in lines]
    return {"wikitext2": wikitext, "ptb": ptb, "c4": c4}


def ids(text: str) -> torch.Tensor:
    return torch.tensor(byte_tokenizer()(text).input_ids)


def windows_of(tokens: torch.Tensor) -> torch.Tensor:
    count = len(tokens) // SEQLEN
    return torch.stack([tokens[i * SEQLEN : (i + 1) * SEQLEN] for i in range(count)])


def random_documents(texts: list[str], count: int, seed: int) -> torch.Tensor:
    random.seed(seed)
    found = []
    for _ in range(count):
        while True:
            tokens = ids(texts[random.randint(0, len(texts) - 1)])
            if len(tokens) > SEQLEN:
                break
        start = random.randint(0, len(tokens) - SEQLEN - 1)
        found.append(tokens[start : start + SEQLEN])
    return torch.stack(found)


def corpora(files: Path, option: str, *words: str, model=LLAMA):
    paths = {"wikitext2": "wiki.raw", "ptb": "ptb.txt", "c4": "c4.jsonl.gz"}
    names = ("wikitext2", "c4_new", "ptb_new") if "new" in option else ("wikitext2", "c4", "ptb")
    words = [
        *(
            f"evaluation.corpora.{name}.path={files / paths[name[:-4] if 'new' in name else name]}"
            for name in names
        ),
        f"evaluation.context={SEQLEN}",
        *words,
    ]
    config = compose_config([f"evaluation={option}", *words])
    return corpus_windows(config, byte_tokenizer(), model)


def test_the_first_forms_of_the_corpora_are_those_of_the_published_code(files):
    found, rows = corpora(files, "papers"), hub_rows(files)
    assert torch.equal(found["wikitext2"].windows, windows_of(ids("\n\n".join(rows["wikitext2"]))))
    assert torch.equal(found["ptb"].windows, windows_of(ids("\n\n".join(rows["ptb"]))))
    assert torch.equal(found["c4"].windows, random_documents(rows["c4"], 256, seed=0))
    assert {corpus.bos for corpus in found.values()} == {"text"}


def test_the_later_forms_of_the_corpora_are_those_of_the_published_code(files):
    found, rows = corpora(files, "papers_new"), hub_rows(files)
    assert torch.equal(found["wikitext2"].windows, windows_of(ids("\n\n".join(rows["wikitext2"]))))
    assert torch.equal(found["ptb_new"].windows, windows_of(ids(" ".join(rows["ptb"]))))
    c4 = ids(" ".join(rows["c4"][:1100]))
    assert torch.equal(found["c4_new"].windows, windows_of(c4[: 256 * SEQLEN]))
    later = ids(" ".join(rows["c4"][1100:]))
    assert len(later) > SEQLEN


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4"])
def test_calibration_windows_are_those_of_the_published_code(name, seed, files, tiny_model):
    path = files / {"wikitext2": "wiki.raw", "ptb": "ptb.txt", "c4": "c4.jsonl.gz"}[name]
    words = [f"calibration={name}", f"calibration.path={path}", "calibration.windows=12"]
    words += ["evaluation=none", f"calibration.seqlen={SEQLEN}", f"seed={seed}"]
    found = tokenize_inputs(compose_config(words), tiny_model).calibration
    rows = hub_rows(files)[name]
    if name == "c4":
        expected = random_documents(rows, 12, seed)
    else:
        tokens = ids("\n\n".join(rows))
        random.seed(seed)
        starts = [random.randint(0, len(tokens) - SEQLEN - 1) for _ in range(12)]
        expected = torch.stack([tokens[start : start + SEQLEN] for start in starts])
    assert torch.equal(found, expected)


def test_the_papers_numbers_of_windows_are_the_defaults():
    config = compose_config(["evaluation=papers", "calibration=c4"])
    assert (config.calibration.windows, config.calibration.seqlen) == (128, 2048)
    assert config.evaluation.context == 2048
    assert config.evaluation.corpora["c4"].windows == 256
    assert config.evaluation.corpora["wikitext2"].windows is None


def test_windows_are_as_long_as_the_model_where_that_is_asked_for(files):
    model = LlamaConfig(max_position_embeddings=80)
    found = corpora(files, "papers", "evaluation.context=model", model=model)
    assert {corpus.windows.shape[1] for corpus in found.values()} == {80}
    with pytest.raises(ConfigError, match=r"evaluation\.context is 96, the model's context 80"):
        corpora(files, "papers", model=model)


def beginning_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    return tokenizer


def test_gemma_gets_its_first_token_in_every_window_and_the_text_has_one_token_less_room(files):
    config = compose_config(
        [
            "evaluation=wikitext2",
            f"evaluation.corpora.wikitext2.path={files / 'wiki.raw'}",
            f"evaluation.context={SEQLEN}",
        ]
    )
    tokenizer, gemma = beginning_tokenizer(), Gemma2Config(max_position_embeddings=4096)
    found = corpus_windows(config, tokenizer, gemma)["wikitext2"]
    assert found.bos == "window"
    assert found.windows.shape[1] == SEQLEN
    assert set(found.windows[:, 0].tolist()) == {tokenizer.bos_token_id}
    text = ids("\n\n".join(hub_rows(files)["wikitext2"]))
    pieces = found.windows[:, 1:].flatten()
    assert torch.equal(pieces, text[: len(pieces)])
    assert len(text) - len(pieces) < SEQLEN - 1
    config.evaluation.bos = "text"
    plain = corpus_windows(config, tokenizer, gemma)["wikitext2"]
    assert plain.bos == "text"
    assert torch.equal(plain.windows, windows_of(text))


def test_the_rule_for_the_first_token():
    kinds = {"llama": "text", "opt": "text", "gemma": "window", "gemma3_text": "window"}
    for kind, rule in kinds.items():
        config = LlamaConfig()
        config.model_type = kind
        assert bos_rule("auto", config) == rule
        assert (bos_rule("text", config), bos_rule("window", config)) == ("text", "window")


def test_a_first_token_that_the_tokenizer_does_not_have_is_refused(files):
    with pytest.raises(ConfigError, match=r"evaluation\.bos=window: .* no beginning-of-text token"):
        corpora(files, "papers", "evaluation.bos=window")


@pytest.mark.case(63)
def test_text_that_calibration_has_seen_is_reported(files, tiny_model):
    words = ["calibration=wikitext2", f"calibration.path={files / 'wiki.raw'}"]
    words += ["calibration.draw=first", "calibration.windows=5", "calibration.seqlen=64"]
    words += ["evaluation=papers", f"evaluation.corpora.wikitext2.path={files / 'wiki.raw'}"]
    words += [f"evaluation.corpora.ptb.path={files / 'ptb.txt'}", "~evaluation.corpora.c4"]
    words += ["evaluation.corpora.wikitext2.windows=10", "evaluation.context=64"]
    found = tokenize_inputs(compose_config(words), tiny_model).corpora
    assert found["wikitext2"].overlap == pytest.approx(0.5, abs=0.02)
    assert found["ptb"].overlap == 0.0


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real corpora are not here")
def test_wikitext2_has_the_published_number_of_llama_tokens():
    path = SHARED / "data" / "wikitext2" / "wiki.test.raw.gz"
    documents = read_documents(TextSource(path=str(path), lines="rows"))
    assert len(documents) == 4358
    llama = load_tokenizer(SHARED / "models" / "stories15M")  # has Llama-2's vocabulary
    tokens = tokenize(llama, "\n\n".join(documents))
    assert len(tokens) == 341_469
    assert len(tokens) // 2048 == 166
    assert tokens[0] == llama.bos_token_id


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real corpora are not here")
@pytest.mark.parametrize(("split", "rows"), [("train", 42_068), ("valid", 3_370), ("test", 3_761)])
def test_ptb_has_the_published_number_of_sentences(split, rows):
    path = SHARED / "data" / "ptb" / f"ptb.{split}.txt.gz"
    text = TextSource(path=str(path), lines="stripped", join=" ")
    assert len(read_documents(text)) == rows
    assert "  " not in read_text(text)
