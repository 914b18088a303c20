"""Hundreds of random damages: a checkpoint gives the same logits or one of our errors."""

from __future__ import annotations

from collections import Counter

import mutations
import pytest
from conftest import byte_tokenizer, tiny_llama
from damages import started
from packed_models import Written

ROUNDS = 36  # damages of each kind: more than 500 in all


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What came of loading each damaged checkpoint, in a process that may crash."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_llama(num_hidden_layers=2, vocab_size=32).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    written = Written(folder / "model")
    (folder / "originals").mkdir()
    written.write(folder / "originals" / "shards", shard_bytes=10_000)
    written.write(folder / "originals" / "whole")
    (folder / "work").mkdir()
    return started(mutations.__file__, folder / "originals", folder / "work", ROUNDS)


@pytest.mark.case(72)
@pytest.mark.parametrize("kernel", mutations.KERNELS)
@pytest.mark.parametrize("mutation", mutations.MUTATIONS)
def test_a_damaged_checkpoint_is_refused_or_does_no_harm(mutation, kernel, cases):
    own = [case for case in cases if (case["mutation"], case["kernel"]) == (mutation, kernel)]
    damaged = [case for case in own if not case["covered"]]
    assert len(damaged) == ROUNDS
    assert [case for case in damaged if case["outcome"] not in ("equal", "refused")] == []


@pytest.mark.case(72)
@pytest.mark.parametrize("mutation", mutations.MUTATIONS)
def test_a_damage_that_the_manifest_covers_up_is_refused_or_loads_alike(mutation, cases):
    covered = [case for case in cases if case["mutation"] == mutation and case["covered"]]
    for first, second in zip(covered[::2], covered[1::2], strict=True):
        assert (first["seed"], first["outcome"]) == (second["seed"], second["outcome"])
        assert first["outcome"].partition(" ")[0] in ("equal", "other", "refused"), first


def test_the_damages_are_many_and_most_are_seen(cases):
    counts = Counter(case["outcome"] for case in cases if not case["covered"])
    assert counts.total() >= 500 * len(mutations.KERNELS)
    assert counts["refused"] > 0.8 * counts.total()
