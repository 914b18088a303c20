"""A job gets one GPU of several and its share of the threads."""

from __future__ import annotations

import threading
import time

import pytest

from claq_exp.sweep import share
from claq_exp.sweep.share import one_gpu, threads_of_job, visible_gpus

JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
RAY = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine with two GPUs and lock files of its own."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(share.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(share.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(share, "LOOK_SECONDS", 0.01)


@pytest.mark.case(85)
def test_jobs_side_by_side_get_different_gpus_and_a_third_one_waits():
    order: list[tuple[str, str]] = []
    first_done = threading.Event()

    def third() -> None:
        with one_gpu("auto", JOBLIB) as environment:
            order.append(("third", environment["CUDA_VISIBLE_DEVICES"]))

    with one_gpu("auto", JOBLIB) as one:
        assert one == {"CUDA_VISIBLE_DEVICES": "0"}
        with one_gpu("cuda", JOBLIB) as two:
            assert two == {"CUDA_VISIBLE_DEVICES": "1"}
            waiting = threading.Thread(target=third)
            waiting.start()
            time.sleep(0.1)
            assert not order
            first_done.set()
        waiting.join(10)
        assert order == [("third", "1")]


@pytest.mark.case(85)
def test_a_slot_is_free_again_when_its_job_has_failed():
    with pytest.raises(RuntimeError), one_gpu("auto", JOBLIB):
        raise RuntimeError
    with one_gpu("auto", JOBLIB) as environment:
        assert environment == {"CUDA_VISIBLE_DEVICES": "0"}


def test_a_job_that_waits_ends_when_the_sweep_is_stopped():
    def stopped() -> None:
        raise KeyboardInterrupt

    with (
        one_gpu("auto", JOBLIB),
        one_gpu("auto", JOBLIB),
        pytest.raises(KeyboardInterrupt),
        one_gpu("auto", JOBLIB, stopped),
    ):
        pass


@pytest.mark.parametrize(
    "chosen", ["3,5", " 3 , 5 ", "GPU-aa,GPU-bb", "MIG-GPU-a/1/0,MIG-GPU-b/1/0"]
)
def test_gpus_are_chosen_among_those_that_a_person_left_visible(chosen, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    names = [name.strip() for name in chosen.split(",")]
    assert visible_gpus() == names
    with one_gpu("auto", JOBLIB) as one, one_gpu("auto", JOBLIB) as two:
        assert [one["CUDA_VISIBLE_DEVICES"], two["CUDA_VISIBLE_DEVICES"]] == names


@pytest.mark.parametrize(
    ("device", "launcher", "visible"),
    [
        ("cpu", JOBLIB, None),
        ("cuda:1", JOBLIB, None),
        ("auto", SLURM, "0,1"),
        ("auto", RAY, "0,1"),
        ("auto", JOBLIB, "1"),
        ("auto", JOBLIB, ""),
        ("auto", JOBLIB, "-1"),
    ],
)
def test_nothing_is_held_where_there_is_nothing_to_share(device, launcher, visible, monkeypatch):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with one_gpu(device, launcher) as one, one_gpu(device, launcher) as two:
        assert one == two == {}


def test_two_slurm_jobs_on_a_node_that_call_their_gpus_alike_do_not_wait(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    with one_gpu("auto", JOBLIB) as one:
        monkeypatch.setenv("SLURM_JOB_ID", "72")
        with one_gpu("auto", JOBLIB) as two:
            assert one == two == {"CUDA_VISIBLE_DEVICES": "0"}


@pytest.mark.parametrize(
    ("threads", "launcher", "expected"),
    [
        (3, {"n_jobs": 2}, 3),
        (None, {"n_jobs": 2}, 4),
        (None, {"n_jobs": 3}, 2),
        (None, {"n_jobs": 20}, 1),
        (None, {"n_jobs": -1}, 1),
        (None, {"n_jobs": -5}, 2),
        (None, {"cpus_per_task": 6}, 6),
        (None, {"cpus_per_task": None}, None),
        (None, {"_target_": "basic"}, None),
    ],
)
def test_threads_are_those_given_or_a_share_of_the_cores(threads, launcher, expected, monkeypatch):
    monkeypatch.setattr(share.os, "sched_getaffinity", lambda pid: range(8))
    assert threads_of_job(threads, launcher) == expected
