"""A sweep from words to its summary.  Hydra's sweeper and launcher do what lies between."""

from __future__ import annotations

import _thread
import contextlib
import os
import re
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from claq_exp.compose.experiment import check_words, explained
from claq_exp.compose.options import PRIMARY, VERSION_BASE, prepare_hydra
from claq_exp.compose.places import packaged_folder
from claq_exp.compose.words import Words
from claq_exp.errors import ClaqError, ConfigError, telling_line
from claq_exp.run_folder import INTERRUPTED, KILLED, RUNNING, RunState
from claq_exp.run_folder.jobs import read_jobs, write_job
from claq_exp.sweep.apart import LAST_SECONDS, LOOK_SECONDS, run_apart
from claq_exp.sweep.grid import Grid, check_draws, check_grid
from claq_exp.sweep.job import RunJob, Sweep, run_sweep_job
from claq_exp.sweep.view import Standing, SweepView, jobs_table
from claq_exp.system.interruption import Interruption, graceful

MULTIRUNS = ".multirun"
COMPOSING = "run|plan|evaluate|fetch|bench runtime"  # commands that take overrides


def run_sweep(
    overrides: list[str],
    command: str,
    run_job: RunJob = run_apart,
    *,
    seeds: Sequence[int] = (),
) -> int:
    """Run all jobs of a sweep and return the exit code: 1 if any is not finished.

    overrides: without `-m`.  command: what a person typed.  run_job: how one job is run.
    seeds: those of the word `seeds=`, which are in the overrides too.  Raises ConfigError before
    anything is started.  Raises KeyboardInterrupt once all jobs have stopped: after the first
    signal they finish the group of layers at hand, a second one waits for nothing.
    """
    grid = check_grid(overrides)
    several = len(seeds) > 1
    if grid.search and several:
        raise ConfigError(
            "seeds= runs every job with each seed, and a search does not; search with one seed, "
            "and run what it finds with seeds="
        )
    if several:
        check_draws(grid.configs)
    if grid.search:
        _quiet_optuna()
    note = Console(stderr=True)
    _line(note, f"{grid.jobs} runs")
    if grid.base.model.remark:
        _line(note, f"Note: {grid.base.model.remark}.")
    sweep = Sweep(command, _own_folder(Path(grid.base.outputs).expanduser()), run_job, several)

    def job(composed: DictConfig) -> float:
        return run_sweep_job(sweep, composed)

    words = [*grid.overrides, f"hydra.sweep.dir='{_quoted(sweep.folder)}'", "--multirun"]
    stopped = complete = False

    def read() -> Standing:
        jobs = tuple(read_jobs(sweep.folder))
        total = len(jobs) if complete and grid.search else grid.jobs  # it may try a job twice
        return Standing(total, jobs, grid.fixed)

    with SweepView(read, note), graceful() as interruption:
        try:
            with interruption.finishing(), _stopped_by(interruption, sweep):
                with_hydra(words, job)
            complete = True
        except KeyboardInterrupt:
            stopped = True
        except Exception as error:  # noqa: BLE001 - a launcher's own; the jobs are on record
            stopped = interruption.asked  # Hydra makes an error of one that meets it composing
            if not stopped:
                _line(note, f"claq-exp: the launcher failed: {telling_line(error)}")
        if stopped:
            _stop(sweep)
    for folder in sweep.folder.iterdir():
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # Hydra makes one for each job
    standing = read()
    _summarize(grid, standing, command)
    if stopped:
        raise KeyboardInterrupt
    return 0 if standing.count("finished") == standing.total else ClaqError.exit_code


def with_hydra(arguments: list[str], job: Callable[[DictConfig], float]) -> None:
    """Hand over to Hydra: grids, launchers, and printing of configs."""
    prepare_hydra()
    conf = str(packaged_folder("conf"))
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hands exceptions to us, in place of a printed traceback
    try:
        hydra.main(version_base=VERSION_BASE, config_path=conf, config_name=PRIMARY)(job)()
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]


def print_config(words: Words) -> None:
    """Have Hydra print what it was asked for.  Raises ConfigError for what cannot be composed."""
    if "--shell-completion" in words.printed:
        _forget_the_command()
    else:
        check_words([word for word in words.overrides if "=" in word])
    with explained(words.overrides):
        with_hydra([*words.printed, *words.overrides], lambda composed: 0.0)


def _forget_the_command() -> None:
    """Take `run`, `plan`, ... out of the line that a shell wants completed."""
    if line := os.environ.get("COMP_LINE"):
        os.environ["COMP_LINE"] = re.sub(rf"^(\s*\S+\s+)({COMPOSING})\s", r"\1", line)


def _quiet_optuna() -> None:
    with contextlib.suppress(ImportError):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)


def _own_folder(outputs: Path) -> Path:
    """Make a folder that no other call has, whatever the clock says."""
    parent = outputs.absolute() / MULTIRUNS
    parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path(tempfile.mkdtemp(prefix=f"{now}-", dir=parent))
    folder.chmod(0o755)
    return folder


def _quoted(path: Path) -> str:
    return str(path).replace("'", "\\'")


@contextlib.contextmanager
def _stopped_by(interruption: Interruption, sweep: Sweep) -> Iterator[None]:
    """After the first signal, have all jobs end, and then the launcher, for which none runs."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_SECONDS):
            if interruption.asked:
                sweep.stop_file.touch()
                if not _any_running(sweep):
                    _thread.interrupt_main()
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _any_running(sweep: Sweep) -> bool:
    return any(job.state.name == RUNNING for job in read_jobs(sweep.folder))


def _stop(sweep: Sweep) -> None:
    """Have all jobs end, wherever they run, and put on record that they were interrupted."""
    sweep.stop_file.touch()
    deadline = time.monotonic() + LAST_SECONDS
    while _any_running(sweep):
        if time.monotonic() > deadline:
            return
        time.sleep(LOOK_SECONDS)
    for job in read_jobs(sweep.folder):
        if job.state.name == KILLED and job.state.reason.startswith("process "):
            interrupted = replace(job, state=RunState(INTERRUPTED))  # its launcher was quicker
            for folder in (sweep.folder, Path(job.results)):
                write_job(folder, interrupted)


def _summarize(grid: Grid, standing: Standing, command: str) -> None:
    console = Console()
    corpora = grid.base.evaluation.corpora
    console.print(jobs_table(standing, f"{next(iter(corpora))} perplexity" if corpora else ""))
    finished = standing.count("finished")
    if finished and any(job.seeds for job in standing.jobs):
        _show_means(console, standing)
    _line(console, standing.line())
    if finished < standing.total:
        _line(console, f"To run what is missing: {command}")
    if finished:
        folders = dict.fromkeys(job.results for job in standing.jobs)  # a job may choose its `name`
        _line(console, f"For tables and plots: {shlex.join(['claq-exp', 'report', *folders])}")


def _show_means(console: Console, standing: Standing) -> None:
    """Print a row for each recipe: mean and deviation over its seeds."""
    from claq_exp.sweep.means import means_of_jobs  # its libraries take a second

    try:
        for table in means_of_jobs(standing.jobs, console.width):
            console.print(table)
    except ClaqError as error:  # the jobs are done and listed above
        _line(console, f"Note: there is no table of means: {error}")


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
