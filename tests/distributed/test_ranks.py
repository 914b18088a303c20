"""Processes that work together: what they share, sum and exchange, and how they end."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from processes import start_ranks

from claq_exp.errors import CalibrationError
from claq_exp.system.distributed import ALONE, Ranks, _transport, owners, together
from claq_exp.system.torchrun import Place

TENSORS = {
    "codes": torch.arange(7, dtype=torch.uint8),
    "books": torch.linspace(0, 1, 6, dtype=torch.float16).view(2, 3),
    "places": torch.tensor([[2**40]]),
    "none": torch.empty(0, 3),
}


def batches(count: int) -> list[torch.Tensor]:
    return [torch.full((2 + number, 3), float(number)) for number in range(count)]


def numbers(rank: int, size: int = 1000) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def everything() -> dict:
    with together() as ranks:
        total = numbers(ranks.rank)
        ranks.sum_(total)
        owner = ranks.size - 1
        given = TENSORS if ranks.rank == owner else None
        return {
            "told": ranks.tell({"rank": 0} if ranks.is_first else None),
            "sum": total,
            "received": ranks.broadcast(owner, f"from {ranks.rank}", given),
            "in_order": list(ranks.in_order(iter(ranks.share(batches(5))), 5)),
            "few": list(ranks.in_order(iter(ranks.share(batches(1))), 1)),
            "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
        }


@pytest.fixture(scope="module", params=[2, 3])
def values(request, tmp_path_factory) -> list[dict]:
    ranks = start_ranks(everything, tmp_path_factory.mktemp("ranks"), size=request.param)
    return [rank.value() for rank in ranks]


def test_all_hear_the_first_ranks_message(values):
    assert all(value["told"] == {"rank": 0} for value in values)


def test_a_sum_is_the_same_on_all_and_right(values):
    exact = sum(numbers(rank) for rank in range(len(values)))
    assert all(torch.equal(value["sum"], values[0]["sum"]) for value in values)
    torch.testing.assert_close(values[0]["sum"], exact, rtol=1e-12, atol=1e-12)


def test_tensors_of_every_type_arrive_as_they_were(values):
    for value in values:
        data, tensors = value["received"]
        assert data == f"from {len(values) - 1}"
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
        assert [t.dtype for t in tensors.values()] == [t.dtype for t in TENSORS.values()]


def test_the_first_rank_gets_all_batches_in_order(values):
    for name, count in (("in_order", 5), ("few", 1)):
        found = values[0][name]
        assert len(found) == count
        assert all(torch.equal(a, b) for a, b in zip(found, batches(count), strict=True))
        assert all(value[name] == [] for value in values[1:])


def test_what_one_says_is_known_to_all(values):
    assert all(value["any"] == [True, False] for value in values)


def test_one_process_alone_does_the_same_without_a_group():
    total = numbers(0)
    ALONE.sum_(total)
    assert torch.equal(total, numbers(0))
    assert ALONE.tell("message") == "message"
    assert ALONE.broadcast(0, "data", TENSORS) == ("data", TENSORS)
    assert len(list(ALONE.in_order(iter(batches(3)), 3))) == 3
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.any(True) and not ALONE.any(False)


def test_items_are_shared_out_in_turn():
    shares = [Ranks(Place(rank, 3)).share(list(range(7))) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def test_the_largest_matrices_are_divided_first():
    weights = {"q": 9, "k": 3, "v": 3, "o": 9}
    assert owners(weights, 2) == {"q": 0, "o": 1, "k": 0, "v": 1}
    assert owners(weights, 1) == dict.fromkeys(weights, 0)
    assert set(owners(weights, 8).values()) == {0, 1, 2, 3}


def fails_on(rank: int, error: BaseException) -> int:
    with together() as ranks:
        if ranks.rank == rank:
            raise error
        ranks.sum_(torch.zeros(3))
        return 0


def fails_in_order(rank: int) -> int:
    def made():
        yield torch.zeros(2)
        if ranks.rank == rank:
            raise CalibrationError("batch 2 holds NaN")
        yield torch.zeros(2)

    with together() as ranks:
        list(ranks.in_order(made(), 2 * ranks.size))
        return 0


@pytest.mark.parametrize("work", [fails_on, fails_in_order])
def test_an_error_of_another_rank_is_the_first_ranks_error(work, tmp_path):
    error = (CalibrationError("batch 2 holds NaN"),) if work is fails_on else ()
    first, second = start_ranks(work, tmp_path, 1, *error, size=2)
    assert first.exit_code() == 99  # as it was raised, for the command line to print
    assert "CalibrationError: batch 2 holds NaN (rank 1)" in first.output()
    assert second.exit_code() == 1
    assert second.output() == ""


def test_an_error_of_the_first_rank_ends_the_others_in_silence(tmp_path):
    first, *others = start_ranks(fails_on, tmp_path, 0, CalibrationError("no text"), size=3)
    assert first.exit_code() == 99
    assert "CalibrationError: no text" in first.output()
    assert "(rank" not in first.output()
    assert [(rank.exit_code(), rank.output()) for rank in others] == [(1, ""), (1, "")]


def test_an_error_that_nobody_expected_is_named_too(tmp_path):
    first, second = start_ranks(fails_on, tmp_path, 1, ZeroDivisionError("a fault"), size=2)
    first.exit_code(), second.exit_code()
    assert "ClaqError: ZeroDivisionError: a fault (rank 1)" in first.output()
    assert "Traceback" in second.output()


def waits_for_the_other(started) -> int:
    with together() as ranks:
        if ranks.rank == 1:
            started.touch()
            time.sleep(60)
        ranks.wait()
        return 0


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_others(killed, tmp_path):
    ranks = start_ranks(waits_for_the_other, tmp_path, tmp_path / "started", size=2)
    ranks[1].wait_for((tmp_path / "started").exists)
    ranks[killed].signal(signal.SIGKILL)
    if killed == 1:
        assert ranks[0].exit_code() == 99
        assert "LostRankError: another process of this run has ended" in ranks[0].output()
    else:
        os.kill(ranks[1].process.pid, signal.SIGINT)  # out of its sleep
        assert ranks[1].exit_code() == 99


def interrupted_while_together() -> list[str]:
    """Send a signal to this process in the middle of what the ranks do together."""
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("handled"))

    def made():
        yield torch.zeros(1)

    with together() as ranks:
        real = torch.distributed.all_gather_object

        def disturbed(*arguments):
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append("disturbed")
            real(*arguments)
            seen.append("finished")

        torch.distributed.all_gather_object = disturbed
        list(ranks.in_order(made(), ranks.size))
    return seen


def test_signals_wait_until_what_all_do_together_is_done(tmp_path):
    first, second = start_ranks(interrupted_while_together, tmp_path, size=2)
    assert first.value() == ["disturbed", "finished"]
    assert second.value() == ["disturbed", "finished", "handled"]


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (0, ["cpu", "cpu"]),
        (1, ["cpu", "cpu"]),  # which one rank alone could use
        (2, ["cuda:0", "cuda:1"]),
    ],
)
def test_sums_are_taken_on_gpus_by_all_ranks_of_a_machine_or_by_none(monkeypatch, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = [_transport(Place(rank, 2, rank, 2)) for rank in range(2)]
    assert [device for device, _ in found] == expected
    assert len({backend for _, backend in found}) == 1
