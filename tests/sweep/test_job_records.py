"""The record of a job says what became of it, while others look on."""

from __future__ import annotations

import threading
import time

import pytest

from claq_exp.errors import ClaqError
from claq_exp.run_folder import RunState
from claq_exp.run_folder.jobs import Job, JobKilledError, read_jobs, recorded_job, write_job
from claq_exp.sweep.run import _own_folder
from claq_exp.sweep.work import WORST, objective

JOB = Job(3, ("seed=1", "name=x"), RunState("running"))


def test_a_job_is_on_record_in_every_folder_from_its_start(tmp_path):
    folders = (tmp_path / "name", tmp_path / "sweep")
    with recorded_job(folders, JOB) as record:
        for folder in folders:
            (job,) = read_jobs(folder)
            assert (job.number, job.overrides, job.state.name) == (3, JOB.overrides, "running")
        record.progress(0.25, "quantize")
        assert read_jobs(folders[0])[0].share == 0.25
        record.finish(folder="run-1", found=False, objective=12.5, notes=("few",))
    for folder in folders:
        (job,) = read_jobs(folder)
        assert job.state == RunState("finished")
        assert (job.folder, job.objective, job.notes, job.share) == ("run-1", 12.5, ("few",), 1.0)
        assert job.seconds >= 0
        assert {path.suffix for path in (folder / "jobs").iterdir()} == {".json", ".lock"}


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ClaqError("no luck\nat all"), RunState("failed", "no luck")),
        (JobKilledError("SIGSEGV"), RunState("killed", "SIGSEGV")),
        (KeyboardInterrupt(), RunState("interrupted")),
        (SystemExit(3), RunState("interrupted")),
    ],
    ids=["failed", "killed", "by a person", "by a scheduler"],
)
def test_how_a_job_ended_is_on_record(error, state, tmp_path):
    with pytest.raises(type(error)), recorded_job((tmp_path,), JOB):
        raise error
    assert read_jobs(tmp_path)[0].state == state


def test_a_running_job_that_nobody_holds_was_killed(tmp_path):
    write_job(tmp_path, Job(0, ("seed=1",), RunState("running", "process 9 on vm")))
    assert read_jobs(tmp_path)[0].state == RunState("killed", "process 9 on vm")


def test_a_job_waits_for_another_process_that_runs_the_same_one(tmp_path):
    entered = []

    def second() -> None:
        with recorded_job((tmp_path,), JOB) as record:
            entered.append(time.monotonic())
            record.finish(folder="run", found=True, objective=None, notes=())

    with recorded_job((tmp_path,), JOB) as record:
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.3)
        assert not entered
        record.finish(folder="run", found=False, objective=None, notes=())
    other.join(10)
    assert entered
    assert read_jobs(tmp_path)[0].found


def test_a_job_that_waits_can_be_stopped(tmp_path):
    def stop() -> None:
        raise KeyboardInterrupt

    with (
        recorded_job((tmp_path,), JOB),
        pytest.raises(KeyboardInterrupt),
        recorded_job((tmp_path,), JOB, stop),
    ):
        pass


def test_looking_on_all_the_time_keeps_no_job_from_starting(tmp_path):
    write_job(tmp_path, JOB)  # left by a kill, so that each look tries its lock
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            read_jobs(tmp_path)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(20):
            with recorded_job((tmp_path,), JOB):
                pass
            write_job(tmp_path, JOB)
    finally:
        ended.set()
        for looker in lookers:
            looker.join()


@pytest.mark.case(15)
@pytest.mark.case(15)
def test_sweeps_started_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    class Frozen:
        @staticmethod
        def now():
            import datetime

            return datetime.datetime(2026, 1, 1)

    monkeypatch.setattr("claq_exp.sweep.run.datetime", Frozen)
    folders = [_own_folder(tmp_path) for _ in range(20)]
    assert len(set(folders)) == 20
    assert all(folder.is_dir() for folder in folders)


@pytest.mark.case(86)
@pytest.mark.parametrize(
    ("value", "expected"),
    [(12.5, 12.5), (None, WORST), (float("nan"), WORST), (float("inf"), WORST), (3e12, WORST)],
)
def test_the_objective_is_a_finite_number_whatever_the_perplexity_is(value, expected):
    assert objective({"perplexity": {"first": {"quantized": value}, "second": {}}}) == expected


def test_without_a_perplexity_there_is_no_objective():
    assert objective({"perplexity": {}}) is None
