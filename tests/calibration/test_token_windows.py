"""Windows of a text: distinct, in one piece, the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claq_exp.calibration.windows import first_windows, sample_windows
from claq_exp.errors import ConfigError

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
TOKENS = torch.arange(1000)


@QUICK
@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 30), st.integers(0, 2**40))
def test_sampled_windows_are_distinct_pieces_of_the_text(seqlen, windows, spare, seed):
    tokens = torch.arange(seqlen * windows + spare)
    sampled = sample_windows(tokens, windows, seqlen, seed, "calibration")
    assert sampled.shape == (windows, seqlen)
    assert sampled.dtype == torch.int64
    starts = sampled[:, 0]
    assert torch.equal(sampled, starts[:, None] + torch.arange(seqlen))
    gaps = starts.sort().values.diff()
    assert (gaps >= seqlen).all()
    assert int(sampled.max()) < len(tokens)


def test_the_same_seed_draws_the_same_windows_whatever_was_drawn_before():
    first = sample_windows(TOKENS, 5, 20, seed=3, where="calibration")
    torch.rand(17)
    assert torch.equal(sample_windows(TOKENS, 5, 20, seed=3, where="calibration"), first)


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    sample_windows(TOKENS, 5, 20, seed=3, where="calibration")
    assert torch.equal(torch.rand(3), expected)


def test_other_seeds_draw_other_windows():
    draws = {
        tuple(sample_windows(TOKENS, 5, 20, seed, "calibration")[:, 0].tolist())
        for seed in range(20)
    }
    assert len(draws) == 20


def test_every_window_of_the_text_can_be_drawn():
    drawn = set()
    for seed in range(30):
        drawn |= set(sample_windows(TOKENS[:100], 3, 10, seed, "calibration")[:, 0].tolist())
    assert drawn == set(range(0, 100, 10))


def test_asking_for_all_windows_gives_all_of_them():
    sampled = sample_windows(TOKENS[:105], 10, 10, seed=0, where="calibration")
    assert sorted(sampled[:, 0].tolist()) == list(range(0, 100, 10))


@pytest.mark.parametrize("draw", [sample_windows, first_windows])
@pytest.mark.parametrize(("tokens", "available"), [(0, 0), (19, 0), (99, 4)])
def test_a_short_text_is_refused_with_the_counts(draw, tokens, available):
    seed = {"seed": 0} if draw is sample_windows else {}
    with pytest.raises(ConfigError) as caught:
        draw(torch.arange(tokens), windows=5, seqlen=20, where="calibration", **seed)
    message = str(caught.value)
    assert f"{tokens} tokens" in message
    assert f"{available} windows of 20" in message
    assert "5 are asked for" in message
    assert "calibration.windows" in message
    assert "calibration.seqlen" in message


def test_first_windows_start_at_the_beginning_and_drop_the_rest():
    assert torch.equal(first_windows(TOKENS[:25], 2, 10, "x"), TOKENS[:20].reshape(2, 10))
    assert torch.equal(first_windows(TOKENS[:25], 1, 10, "x"), TOKENS[:10].reshape(1, 10))


def test_first_windows_without_a_number_are_all():
    assert torch.equal(first_windows(TOKENS[:39], None, 10, "x"), TOKENS[:30].reshape(3, 10))
    with pytest.raises(ConfigError, match="7 tokens"):
        first_windows(TOKENS[:7], None, 10, "x")
