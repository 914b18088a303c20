"""How far a sweep is, said in one line, in bars and in a table."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from claq_exp.run_folder import RunState
from claq_exp.run_folder.jobs import Job
from claq_exp.sweep.view import Standing, SweepView, clock, jobs_table

FIXED = frozenset({"name"})


def job(number: int, state: str, reason: str = "", **more) -> Job:
    return Job(number, ("name=x", f"seed={number}"), RunState(state, reason), **more)


MIXED = (
    job(0, "finished", objective=30.5, seconds=100.0, share=1.0),
    job(1, "finished", objective=20.25, seconds=1.0, found=True, share=1.0),
    job(2, "failed", "no [such] luck", seconds=5.0),
    job(3, "killed", "SIGKILL", seconds=7.0),
    job(4, "running", share=0.5, seconds=40.0, stage="quantize block 3"),
    job(5, "running", share=0.0, seconds=1.0),
)


def test_the_line_counts_every_state_and_names_the_best():
    assert Standing(8, MIXED, FIXED).line() == (
        "2 of 8 done, 1 of them found, 1 failed, 1 killed, 2 running, 2 waiting, 2:55 min left, "
        "best 20.25 (seed=1)"
    )


def test_time_left_counts_what_waits_and_what_runs_side_by_side():
    # jobs take 100 s; half a job, a whole one and two that wait, two at a time
    assert Standing(8, MIXED).left == pytest.approx((0.5 * 100 + 100 + 2 * 100) / 2)


def test_the_first_job_tells_the_time_left_by_its_own_speed():
    running = job(0, "running", share=0.25, seconds=10.0)
    assert Standing(3, (running,)).left == pytest.approx(30 + 2 * 40)
    assert Standing(3, (job(0, "running", share=0.01, seconds=10.0),)).left is None
    assert Standing(3, ()).left is None


def test_found_runs_say_nothing_of_the_time_that_others_take():
    found = job(0, "finished", found=True, seconds=0.5)
    assert Standing(2, (found, job(1, "running", seconds=1.0))).left is None


def test_the_share_counts_ended_jobs_whole_and_running_ones_in_part():
    assert Standing(8, MIXED).share == pytest.approx(4.5 / 8)
    assert Standing(0, ()).share == 0


@pytest.mark.parametrize("value", [None, 1e9])
def test_a_job_without_a_finite_objective_is_not_the_best(value):
    jobs = (job(0, "finished", objective=value), job(1, "failed"))
    assert Standing(2, jobs).best is None


def shown(*, terminal: bool, jobs: tuple[Job, ...] = MIXED) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=150)
    with SweepView(lambda: Standing(8, jobs, FIXED), console):
        pass
    return stream.getvalue()


def test_every_job_that_ended_is_told_once_with_its_reason():
    assert shown(terminal=False).splitlines() == [
        "job 0 finished in 1:40 min, 30.5 (seed=0)",
        "job 1 found finished, 20.25 (seed=1)",
        "claq-exp: job 2 failed (seed=2): no [such] luck",
        "claq-exp: job 3 killed (seed=3): SIGKILL",
    ]


def test_a_terminal_shows_a_bar_for_the_sweep_and_one_for_each_running_job():
    text = shown(terminal=True)
    assert "\x1b[" in text
    assert "all jobs" in text
    assert "2 running, 2 waiting" in text
    assert "quantize block 3  seed=4" in text


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(monkeypatch):
    stream = io.StringIO()
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr("claq_exp.sweep.view.time.monotonic", lambda: float(next(clock)))
    view = SweepView(lambda: Standing(8, MIXED[4:], FIXED), Console(file=stream, width=150))
    for _ in range(7):
        view.look()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("[  6 %] 0 of 8 done, 2 running, 6 waiting") for line in lines)


def test_notes_of_a_job_stand_below_it():
    noted = job(0, "finished", objective=2.0, seconds=61.0, notes=("few tokens",))
    assert shown(terminal=False, jobs=(noted,)).splitlines()[1] == "  Note: few tokens"


def test_the_table_has_a_row_for_each_job_and_no_cell_is_markup():
    stream = io.StringIO()
    Console(file=stream, width=150).print(jobs_table(Standing(8, MIXED, FIXED), "perplexity"))
    text = stream.getvalue()
    assert "failed: no [such] luck" in text
    assert "found finished" in text
    assert text.count("seed=") == 6


def test_where_nothing_is_measured_the_table_has_no_column_for_it():
    headings = [column.header for column in jobs_table(Standing(8, MIXED, FIXED), "").columns]
    assert headings == ["#", "job", "state", "time"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (61, "1:01 min"), (7384, "2:03 h")]
)
def test_times_are_short(seconds, text):
    assert clock(seconds) == text
