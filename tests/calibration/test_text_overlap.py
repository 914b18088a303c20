"""Passages that evaluation and calibration share are found, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claq_exp.calibration.overlap import PASSAGE, shared_share


def random_windows(count: int, seqlen: int, seed: int, vocabulary: int = 50_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (count, seqlen), generator=generator)


def slow(windows: torch.Tensor, calibration: torch.Tensor) -> float:
    """Compare every passage with every other, token by token."""
    known = {
        tuple(row[start : start + PASSAGE])
        for row in calibration.tolist()
        for start in range(len(row) - PASSAGE + 1)
    }
    covered = [[False] * windows.shape[1] for _ in windows]
    for number, row in enumerate(windows.tolist()):
        for start in range(len(row) - PASSAGE + 1):
            if tuple(row[start : start + PASSAGE]) in known:
                covered[number][start : start + PASSAGE] = [True] * PASSAGE
    return sum(map(sum, covered)) / windows.numel()


@pytest.mark.case(63)
@settings(max_examples=40)
@given(
    vocabulary=st.sampled_from([2, 50_000]),
    length=st.integers(PASSAGE - 3, 60),
    place=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_it_equals_a_comparison_of_all_passages(vocabulary, length, place, seed):
    windows = random_windows(3, 90, seed, vocabulary)
    calibration = random_windows(2, 70, seed + 1, vocabulary)
    copied = min(length, 70 - place, 90 - place)
    calibration[1, place : place + copied] = windows[2, 5 : 5 + copied]
    assert shared_share(windows, calibration) == slow(windows, calibration)


def test_the_same_text_is_shared_whole_and_another_not_at_all():
    windows = random_windows(4, 100, 0)
    assert shared_share(windows, windows.flip(0)) == 1.0
    assert shared_share(windows, random_windows(4, 100, 1)) == 0.0
    assert shared_share(windows, windows.flip(1)) == 0.0


@pytest.mark.parametrize("seqlen", [1, PASSAGE - 1])
def test_windows_shorter_than_a_passage_share_nothing(seqlen):
    windows = random_windows(4, 100, 0)
    assert shared_share(windows[:, :seqlen], windows) == 0.0
    assert shared_share(windows, windows[:, :seqlen]) == 0.0


def test_a_run_of_one_token_is_told_from_a_longer_run_of_another():
    zeros, ones = torch.zeros(1, 64, dtype=torch.int64), torch.ones(1, 64, dtype=torch.int64)
    assert shared_share(zeros, ones) == 0.0
    assert shared_share(zeros, zeros[:, :40]) == 1.0
