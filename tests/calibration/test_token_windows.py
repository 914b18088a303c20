"""Windows of a text: by the papers' conventions, in one piece, the same for the same seed."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claq_exp.calibration.windows import DRAWS, Draw, begin_with
from claq_exp.errors import ConfigError

QUICK = settings(max_examples=60)
TEXT = " ".join(map(str, range(1000)))


def numbers(text: str) -> torch.Tensor:
    """A tokenizer for texts of numbers: each is its own token."""
    return torch.tensor([int(word) for word in text.split()], dtype=torch.int64)


def draw(name: str, windows: int | None, seqlen: int, seed: int = 0, text=(TEXT,), join=" "):
    return DRAWS[name](text, join, numbers, Draw(windows, seqlen, seed, "calibration"))


def sentences(count: int, seed: int = 7) -> list[str]:
    """Documents of 3 to 40 tokens, none of which stands in two documents."""
    generator, next_token = random.Random(seed), itertools.count()
    return [
        " ".join(str(next(next_token)) for _ in range(generator.randint(3, 40)))
        for _ in range(count)
    ]


@QUICK
@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 30), st.integers(0, 2**40))
def test_shuffled_windows_are_distinct_pieces_of_the_text(seqlen, windows, spare, seed):
    count = seqlen * windows + spare
    sampled = draw("shuffled", windows, seqlen, seed, [" ".join(map(str, range(count)))])
    assert sampled.shape == (windows, seqlen)
    assert sampled.dtype == torch.int64
    starts = sampled[:, 0]
    assert torch.equal(sampled, starts[:, None] + torch.arange(seqlen))
    gaps = starts.sort().values.diff()
    assert (gaps >= seqlen).all()
    assert int(sampled.max()) < count


@pytest.mark.case(40)
@pytest.mark.parametrize("name", ["shuffled", "positions", "documents"])
def test_the_same_seed_draws_the_same_windows_and_leaves_global_generators_alone(name):
    documents = sentences(50)
    torch.manual_seed(1)
    random.seed(1)
    expected = torch.rand(3).tolist(), random.random()
    torch.manual_seed(1)
    random.seed(1)
    first = draw(name, 5, 20, 3, documents)
    assert (torch.rand(3).tolist(), random.random()) == expected
    assert torch.equal(draw(name, 5, 20, 3, documents), first)


@pytest.mark.case(40)
@pytest.mark.parametrize("name", ["shuffled", "positions", "documents"])
def test_other_seeds_draw_other_windows(name):
    documents = sentences(50)
    draws = {tuple(draw(name, 5, 20, seed, documents)[:, 0].tolist()) for seed in range(20)}
    assert len(draws) == 20


def test_every_window_of_the_text_can_be_drawn():
    text = [" ".join(map(str, range(100)))]
    drawn = set()
    for seed in range(30):
        drawn |= set(draw("shuffled", 3, 10, seed, text)[:, 0].tolist())
    assert drawn == set(range(0, 100, 10))
    places = {int(draw("positions", 1, 90, seed, text)[0, 0]) for seed in range(300)}
    assert places == set(range(10))


def test_asking_for_all_windows_gives_all_of_them():
    sampled = draw("shuffled", None, 10, 0, [" ".join(map(str, range(105)))])
    assert sorted(sampled[:, 0].tolist()) == list(range(0, 100, 10))


@pytest.mark.case(59, 92)
@pytest.mark.parametrize("name", ["first", "shuffled"])
@pytest.mark.parametrize(("tokens", "available"), [(0, 0), (19, 0), (99, 4)])
def test_a_short_text_is_refused_with_the_counts(name, tokens, available):
    with pytest.raises(ConfigError) as caught:
        draw(name, 5, 20, 0, [" ".join(map(str, range(tokens)))])
    message = str(caught.value)
    assert f"{tokens} tokens" in message
    assert f"{available} windows of 20" in message
    assert "5 are asked for" in message
    assert "calibration.windows" in message


@pytest.mark.case(92)
def test_first_windows_start_at_the_beginning_and_drop_the_rest():
    text = [" ".join(map(str, range(39)))]
    assert torch.equal(draw("first", 2, 10, 0, text), torch.arange(20).reshape(2, 10))
    assert torch.equal(draw("first", None, 10, 0, text), torch.arange(30).reshape(3, 10))
    with pytest.raises(ConfigError, match="39 tokens"):
        draw("first", None, 40, 0, text)


def test_windows_run_over_the_joins_of_documents():
    documents = ["1 2 3", "4 5", "6 7 8"]
    assert draw("first", None, 4, 0, documents, " 0 ").tolist() == [[1, 2, 3, 0], [4, 5, 0, 6]]


def test_positions_are_those_of_the_papers_loop():
    found = draw("positions", 9, 30, 11)
    random.seed(11)  # as the papers' code: the global generator, one randint a window
    starts = [random.randint(0, 1000 - 30 - 1) for _ in range(9)]
    assert found[:, 0].tolist() == starts
    assert torch.equal(found, torch.tensor(starts)[:, None] + torch.arange(30))


@pytest.mark.parametrize("seed", range(5))
def test_documents_are_those_of_the_papers_loop(seed):
    documents = sentences(60)
    found = draw("documents", 12, 20, seed, documents)
    random.seed(seed)
    expected = []
    for _ in range(12):
        while True:
            tokens = numbers(documents[random.randint(0, len(documents) - 1)])
            if len(tokens) > 20:
                break
        start = random.randint(0, len(tokens) - 20 - 1)
        expected.append(tokens[start : start + 20].tolist())
    assert found.tolist() == expected


def test_a_document_of_just_a_window_is_too_short_as_the_papers_loop_would_trip_over_it():
    documents = [" ".join(map(str, range(20))), " ".join(map(str, range(100, 121)))]
    assert set(draw("documents", 30, 20, 0, documents)[:, 0].tolist()) == {100}


@pytest.mark.case(59)
@pytest.mark.parametrize("documents", [sentences(30), [], [""]], ids=["short", "none", "empty"])
def test_documents_that_are_all_too_short_end_in_one_line_and_not_in_a_loop(documents):
    with pytest.raises(ConfigError, match=r"none of more than 40 tokens.*draw=shuffled") as caught:
        draw("documents", 1, 40, 0, documents)
    assert f"{len(documents)} documents" in str(caught.value)


def test_a_text_that_is_no_longer_than_a_window_has_no_positions():
    with pytest.raises(ConfigError, match=r"1000 tokens, i\.e\. no window of 1000"):
        draw("positions", 1, 1000)


@pytest.mark.parametrize("name", ["positions", "documents"])
def test_a_random_draw_needs_a_number(name):
    with pytest.raises(ConfigError, match=f"calibration.draw={name} needs a number of windows"):
        draw(name, None, 10, 0, sentences(20))


def test_a_token_in_front_of_every_window_leaves_the_text_as_it_is():
    windows = draw("first", 3, 5)
    begun = begin_with(9999, windows)
    assert begun[:, 0].tolist() == [9999] * 3
    assert torch.equal(begun[:, 1:], windows)


def test_every_draw_names_its_group_in_its_message():
    for name, function in DRAWS.items():
        request = replace(Draw(1, 5000, 0, "x"), where=f"evaluation.corpora.{name}")
        with pytest.raises(ConfigError, match=f"^evaluation.corpora.{name}: the text has "):
            function([TEXT], " ", numbers, request)
