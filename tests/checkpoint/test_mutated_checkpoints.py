"""Hundreds of random damages: a checkpoint gives the same logits or one of our errors."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from packed_models import Written

from claq_exp.checkpoint.manifest import write_manifest
from claq_exp.checkpoint.reader import load_model
from claq_exp.checkpoint.shards import read_spans
from claq_exp.errors import ClaqError

TOKENS = torch.arange(12).reshape(1, 12)
VALUES: list[Any] = [None, -1, 0, 1, 2, 2**40, 2.5, 1e300, True, "", "x", "../x", [], [1], {}]
ROUNDS = 8  # each of this many cases of every kind


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_llama(num_hidden_layers=2, vocab_size=32).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    written = Written(folder / "model")
    return [written.write(folder / "whole"), written.write(folder / "shards", shard_bytes=10_000)]


@pytest.fixture(scope="module")
def expected(originals: list[Path]) -> torch.Tensor:
    return logits(originals[0])


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load_model(folder)(TOKENS).logits


def some_file(folder: Path, dice: random.Random, pattern: str = "*") -> Path:
    return dice.choice(sorted(folder.glob(pattern)))


def flip(folder: Path, dice: random.Random) -> None:
    path = some_file(folder, dice)
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def flip_in_header(folder: Path, dice: random.Random) -> None:
    path = some_file(folder, dice, "*.safetensors")
    content = bytearray(path.read_bytes())
    content[dice.randrange(8 + int.from_bytes(content[:8], "little"))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def cut(folder: Path, dice: random.Random) -> None:
    path = some_file(folder, dice)
    path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])


def grow(folder: Path, dice: random.Random) -> None:
    with some_file(folder, dice).open("ab") as file:
        file.write(dice.randbytes(dice.randint(1, 20)))


def remove(folder: Path, dice: random.Random) -> None:
    some_file(folder, dice).unlink()


def swap_files(folder: Path, dice: random.Random) -> None:
    first, second = some_file(folder, dice), some_file(folder, dice)
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


def swap_tensors(folder: Path, dice: random.Random) -> None:
    file = some_file(folder, dice, "*.safetensors")
    spans = list(read_spans(folder)[file.name].values())
    first = dice.choice(spans)
    alike = [span for span in spans if span.end - span.start == first.end - first.start]
    second = dice.choice(alike)
    content = bytearray(file.read_bytes())
    one, two = content[first.start : first.end], content[second.start : second.end]
    content[first.start : first.end], content[second.start : second.end] = two, one
    file.write_bytes(content)


def edit_json(folder: Path, dice: random.Random) -> None:
    path = some_file(folder, dice, "*.json")
    data = json.loads(path.read_text())
    place: Any = data
    while True:
        key = dice.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not (isinstance(place[key], dict | list) and place[key]) or dice.random() < 0.1:
            break
        place = place[key]
    change = dice.randrange(4)
    if change == 0:
        del place[key]
    elif change == 1 and isinstance(place, dict):
        place[dice.choice(["x", "../x", "dtype", "auto_map"])] = place.pop(key)
    else:
        place[key] = dice.choice(VALUES)
    path.write_text(json.dumps(data))


def edit_config(folder: Path, dice: random.Random) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data[dice.choice(sorted(data))] = dice.choice(VALUES)
    path.write_text(json.dumps(data))


def edit_layout(folder: Path, dice: random.Random) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    layout = dice.choice(list(data["quantization_config"]["modules"].values()))
    layout[dice.choice(sorted(layout))] = dice.choice([*VALUES, {"2": 48}, {"4": 24, "2": 24}])
    path.write_text(json.dumps(data))


MUTATIONS = [
    *(flip, flip_in_header, cut, grow, remove, swap_files, swap_tensors),
    *(edit_json, edit_config, edit_layout),
]


def mutated(originals: list[Path], mutation: Any, seed: int, target: Path) -> Path:
    folder = Path(shutil.copytree(originals[seed % 2], target / str(seed)))
    mutation(folder, random.Random(seed))
    return folder


@pytest.mark.case(72)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_damaged_checkpoint_is_refused_or_does_no_harm(mutation, originals, expected, tmp_path):
    for seed in range(2 * ROUNDS):
        folder = mutated(originals, mutation, seed, tmp_path)
        try:
            found = logits(folder)
        except ClaqError as error:
            assert "\n" not in str(error), (seed, error)
        else:
            assert torch.equal(found, expected), seed


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_damage_that_the_manifest_covers_up_is_loaded_or_refused(mutation, originals, tmp_path):
    for seed in range(ROUNDS):
        folder = mutated(originals, mutation, seed, tmp_path)
        try:
            write_manifest(folder)
            load_model(folder)
        except ClaqError as error:
            assert "\n" not in str(error), (seed, error)
