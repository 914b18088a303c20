"""The cache: one entry for all, never a damaged one, and runs go on without it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from claq_exp.errors import SourceError
from claq_exp.evaluation.scores import ScoreStore
from claq_exp.sources.cache import cache_folder, cached_folder, fetch_log
from claq_exp.sources.kept import kept_tensors
from claq_exp.sources.wheel import fetch_wheel_file

KEY = {"text": "abc", "draw": [8, 64, 0]}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def unwritable(tmp_path, monkeypatch) -> Path:
    """A place where no folder can be made, whoever asks."""
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(tmp_path / "taken" / "cache"))
    return tmp_path / "taken" / "cache"


def fill(folder: Path) -> None:
    (folder / "whole").write_text("first")


def test_a_folder_is_made_once(cache):
    assert cached_folder("models/x", fill) == cache / "models" / "x"

    def again(folder: Path) -> None:
        raise AssertionError

    assert (cached_folder("models/x", again) / "whole").read_text() == "first"


def test_of_two_that_make_a_folder_the_first_one_wins(cache):
    def slower(folder: Path) -> None:
        cached_folder("models/x", fill)
        (folder / "whole").write_text("second")

    assert (cached_folder("models/x", slower) / "whole").read_text() == "first"
    assert [path.name for path in (cache / "models").iterdir()] == ["x"]


@pytest.mark.case(19, 79)
def test_what_must_lie_somewhere_says_that_the_cache_cannot_be_written(unwritable):
    with pytest.raises(SourceError, match=r"cache .*taken/cache cannot be written \(.*CLAQ_EXP_CA"):
        cached_folder("models/x", fill)
    with pytest.raises(SourceError, match="cannot be written"):
        fetch_wheel_file("wheel://name==1.0/data.txt", "0" * 64)
    assert fetch_log() == Path(os.devnull)


@pytest.mark.case(19, 79)
def test_a_cache_that_is_read_only_gives_what_it_has_and_takes_nothing(cache, monkeypatch):
    store = ScoreStore(cache / "originals", {"model": "abc"})
    store.keep({"corpus": "a"}, {"value": 2.5})
    kept_tensors("tokens", KEY, lambda: {"windows": torch.arange(6)})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("claq_exp.sources.kept.write_bytes", refuse)
    monkeypatch.setattr("claq_exp.evaluation.scores.write_json", refuse)
    assert store.find({"corpus": "a"}) == {"value": 2.5}
    store.keep({"corpus": "b"}, {"value": 3.5})
    assert store.find({"corpus": "b"}) is None
    assert kept_tensors("tokens", KEY, dict)["windows"].tolist() == list(range(6))
    other = kept_tensors("tokens", {**KEY, "text": "abd"}, lambda: {"windows": torch.ones(2)})
    assert other["windows"].tolist() == [1, 1]


@pytest.mark.case(79)
def test_without_a_home_the_cache_is_one_that_cannot_be_made(monkeypatch):
    for name in ("CLAQ_EXP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    assert fetch_log() == Path(os.devnull)
    with pytest.raises(SourceError, match="CLAQ_EXP_CACHE"):
        cached_folder("models/x", fill)
    assert not cache_folder().exists()


def damages(content: bytes, dice: random.Random) -> list[bytes]:
    """Return a file cut short, grown, and with a bit flipped in every eighth byte."""
    found = [content[: dice.randrange(len(content))] for _ in range(20)] + [content + b"x"]
    for place in range(dice.randrange(8), len(content), 8):
        flipped = content[place] ^ (1 << dice.randrange(8))
        found.append(content[:place] + bytes([flipped]) + content[place + 1 :])
    return found


def test_a_damaged_score_is_none_or_does_no_harm(cache):
    store = ScoreStore(cache / "originals", {"model": "abc"})
    score = {"value": 12.25, "tokens": 511, "sha": "x"}
    store.keep({"corpus": "a"}, score)
    (path,) = store.folder.iterdir()
    for content in damages(path.read_bytes(), random.Random(1)):
        path.write_bytes(content)
        assert store.find({"corpus": "a"}) in (None, score)


def test_damaged_tokens_are_made_again_or_do_no_harm(cache):
    windows = torch.arange(24).reshape(2, 12)

    def tokens() -> torch.Tensor:
        return kept_tensors("tokens", KEY, lambda: {"windows": windows.clone()})["windows"]

    tokens()
    (path,) = (cache / "tokens").iterdir()
    for content in damages(path.read_bytes(), random.Random(2)):
        path.write_bytes(content)
        assert torch.equal(tokens(), windows)
