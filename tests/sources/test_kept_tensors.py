"""What was computed before is used again for the same key, and for no other."""

from __future__ import annotations

import pytest
import torch

from claq_exp.sources.kept import digest_of, kept_tensors


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(tmp_path))
    return tmp_path


def make_counted():
    calls = []

    def make() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor([0.5, float("inf")])}

    return make, calls


def same(found: dict[str, torch.Tensor], made: dict[str, torch.Tensor]) -> bool:
    return found.keys() == made.keys() and all(torch.equal(found[key], made[key]) for key in made)


def test_the_second_time_finds_the_very_tensors():
    make, calls = make_counted()
    first = kept_tensors("things", {"x": 1}, make)
    second = kept_tensors("things", {"x": 1}, make)
    assert len(calls) == 1
    assert same(first, second)


@pytest.mark.parametrize("key", [{"x": 2}, {"x": "1"}, {"x": 1, "y": None}])
def test_another_key_is_made_for_itself(key):
    make, calls = make_counted()
    kept_tensors("things", {"x": 1}, make)
    kept_tensors("things", key, make)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:40],
        lambda content: b"",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content.replace(b'\\"x\\": 1', b'\\"x\\": 9'),
    ],
    ids=["cut", "empty", "flipped", "another key"],
)
def test_a_damaged_file_is_made_again(damage, cache):
    make, calls = make_counted()
    made = kept_tensors("things", {"x": 1}, make)
    (path,) = cache.glob("things/*.safetensors")
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    assert same(kept_tensors("things", {"x": 1}, make), made)
    assert len(calls) == 2
    assert same(kept_tensors("things", {"x": 1}, make), made)
    assert len(calls) == 2


def test_a_digest_knows_shape_and_type():
    flat = torch.arange(6)
    digests = {digest_of(x) for x in (flat, flat.reshape(2, 3), flat.int(), flat.flip(0))}
    assert len(digests) == 4
