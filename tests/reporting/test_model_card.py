"""README.md of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from claq_exp.checkpoint.manifest import CARD, MANIFEST, check_manifest
from claq_exp.checkpoint.writer import write_card
from claq_exp.cli import main
from claq_exp.reporting.card import model_card, plain_command
from claq_exp.run.job import Job

BITS = {"nominal": 2.5, "linear": 2.75, "model": 4.125}


@pytest.fixture
def config(tiny_run) -> dict:
    from claq_exp.compose.experiment import compose_config

    return compose_config(tiny_run).as_dict()


def checkpoint_of(folder: Path) -> Path:
    (found,) = folder.rglob("checkpoint")
    return found


def front_matter(text: str) -> dict:
    before, matter, _ = text.split("---\n", 2)
    assert before == ""
    return yaml.safe_load(matter)


def test_a_run_leaves_a_card_with_what_was_measured(tiny_run, tmp_path, monkeypatch):
    written = []
    whole = Job._card
    monkeypatch.setattr(Job, "_card", lambda *given: written.append(whole(*given)) or written[-1])
    assert main([*tiny_run, "threads=1"]) == 0
    checkpoint = checkpoint_of(tmp_path / "outputs")
    text = (checkpoint / CARD).read_text()
    results = json.loads((checkpoint.parent / "results.json").read_text())
    first, last = written
    assert "Not measured yet." in first
    assert text == last
    assert f"{results['perplexity']['wikipedia']['quantized']:.2f} |" in text
    for kind in BITS:
        assert f"| {results['bits'][kind]:.3f} |" in text
        assert f"| {results['bits'][kind]:.3f} |" in first
    assert CARD not in json.loads((checkpoint / MANIFEST).read_text())["files"]
    check_manifest(checkpoint)
    write_card(checkpoint, "mine")  # nothing else depends on it
    check_manifest(checkpoint)


def test_the_same_run_elsewhere_has_the_same_card(tiny_run, tmp_path):
    cards = []
    for place in ("one", "two"):
        words = [word for word in tiny_run if not word.startswith("outputs=")]
        assert main([*words, f"outputs={tmp_path / place}", "threads=1"]) == 0
        cards.append((checkpoint_of(tmp_path / place) / CARD).read_text())
    assert cards[0] == cards[1]
    assert "/" not in plain_command(cards[0].split("```sh\n")[1].split("\n```")[0])
    for part in (str(tmp_path), str(tmp_path.parent), "/tmp", "/home"):
        assert part not in cards[0]


@pytest.mark.parametrize(
    ("source", "base"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("/models/mine", None),
        ("./models/mine", None),
        ("wheel://pack==1.0/pack/model.gguf", None),
    ],
)
def test_the_hub_understands_the_front_matter(source, base, config):
    from huggingface_hub import ModelCard

    config["model"] |= {"source": source, "name": "mine"}
    text = model_card(config, "claq-exp", BITS, 12_345_678)
    matter = front_matter(text)
    assert matter.get("base_model") == base
    assert matter.get("base_model_relation") == ("quantized" if base else None)
    assert matter["library_name"] == "transformers"
    assert ModelCard(text).data.tags == matter["tags"]
    assert "/models" not in text


def test_the_recipe_names_what_does_something(config):
    text = model_card(config, "claq-exp", BITS, 1)
    assert "| codebook | **kmeans** |" in text
    assert "| transform |" not in text
    assert "| budget |" not in text


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("claq-exp", "claq-exp"),
        ("claq-exp run experiment=claq_2.12 -v", "claq-exp experiment=claq_2.12"),
        ("claq-exp seed=1 threads=2 outputs=/x/y tracking=none name=z", "claq-exp seed=1"),
        ("torchrun --nproc-per-node 2 -m claq_exp seed=1", "claq-exp seed=1"),
        ("claq-exp model.source=/home/me/my model", "claq-exp model.source=my model"),
        ("claq-exp 'model.source=/home/me/my model'", "claq-exp 'model.source=my model'"),
        ("claq-exp 'model.source=\"/home/me/my model\"'", "claq-exp 'model.source=my model'"),
        ("claq-exp model.source=org/name", "claq-exp model.source=org/name"),
        (
            "claq-exp 'calibration.path=[/a/b.txt,~/c/d.txt]'",
            "claq-exp 'calibration.path=[b.txt,d.txt]'",
        ),
        (
            "claq-exp model.source=wheel://a==1/b/c.gguf",
            "claq-exp model.source=wheel://a==1/b/c.gguf",
        ),
    ],
)
def test_a_command_has_no_places_and_no_words_without_effect(typed, said):
    assert plain_command(typed) == said
