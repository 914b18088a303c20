"""The command line, one thin function for each command."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from claq_exp import __version__
from claq_exp.compose.seeds import first_seed, lists_seeds
from claq_exp.compose.words import folders_of, only_overrides, read_words
from claq_exp.errors import ClaqError, ConfigError, telling_line
from claq_exp.system import interruption
from claq_exp.system.torchrun import place
from claq_exp.tracking.quiet import quiet_libraries, show_what_can_be_shown

if TYPE_CHECKING:
    from claq_exp.config import ExperimentConfig
    from claq_exp.system.distributed import Ranks

DEBUG = "--debug"
USAGE = """\
claq-exp [run] [OVERRIDES] [-m]        quantize a model and measure what it cost (default)
claq-exp plan [OVERRIDES]              bits, bytes, memory and time before any work
claq-exp evaluate checkpoint=PATH      measure an existing checkpoint, also one that others made:
                                       GPTQ, AWQ, GGUF, ... (docs/peers.md)
claq-exp report FOLDER ...             tables and plots of all runs below folders; --by KEY ...,
                                       --rows KEY,... --columns KEY,... --metrics NAME,...,
                                       --sort NAME, --seeds, --into FOLDER, --wandb
claq-exp report --compare RUN RUN      two runs, or two folders of seeds: is the difference more
                                       than chance? --replay RUN ... logs runs to Weights & Biases
                                       again; docs/reports.md has the whole
claq-exp inspect PATH [--layers]       bits, bytes and outliers of a checkpoint; --plot FILE.png
claq-exp export FOLDER TARGET          write a checkpoint for other programs; dtype=float16,
                                       format=dense, gptq, compressed-tensors or gguf
claq-exp bench runtime checkpoint=...  speed and memory of a checkpoint with each kernel
claq-exp fetch [OVERRIDES]             bring model and data into the local cache

An override is GROUP=OPTION or GROUP.FIELD=VALUE, e.g. precision.target_bits=2.1 reservation=none.
-m runs every combination of values listed with commas; sweep=NAME runs a grid from sweeps/;
seeds=0,1,2 runs every job with each seed, and shows mean and spread in place of single runs.
-v shows a line for each tensor that is quantized, with any fallback and its reason.
--config-dir DIR adds your own options, e.g. DIR/experiment/NAME.yaml (docs/sweeps.md).
--cfg job prints the composed config; --version prints the version; --debug shows the Python
traceback of an error.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 done, 1 failed, 2 wrong request, 75 interrupted by Ctrl-C or SIGTERM.
    """
    typed = list(sys.argv[1:] if argv is None else argv)
    arguments = [word for word in typed if word != DEBUG]
    quiet_libraries()
    show_what_can_be_shown()
    try:
        with interruption.graceful():
            return _start(arguments)
    except Exception as error:  # noqa: BLE001 - nobody wants a traceback in place of a sentence
        if DEBUG in typed:
            traceback.print_exc()
        return _complain_of(error, arguments)
    except KeyboardInterrupt:
        if place().rank == 0:  # a signal comes to all processes
            again = _command(arguments)
            _complain(f"interrupted; the same command goes on where this one stopped: {again}")
        return interruption.EXIT_CODE


def _start(arguments: list[str]) -> int:
    """Carry out a command; of several processes the first does, and the others help it."""
    if place().size == 1:
        return _dispatch(arguments)
    from claq_exp.run.assist import assist
    from claq_exp.system.distributed import together

    with together() as ranks:
        if not ranks.is_first:
            return assist(ranks)
        code = _dispatch(arguments, ranks)
        ranks.tell(None)
        return code


def _dispatch(arguments: list[str], ranks: Ranks | None = None) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": lambda words: _run(words, ranks),
        "plan": _plan,
        "report": _report,
        "evaluate": _evaluate,
        "inspect": _inspect,
        "export": _export,
        "bench": _bench,
        "fetch": _fetch,
    }
    if any(flag in arguments for flag in ("-h", "--help")):
        return _help(arguments)
    if "--version" in arguments:
        Console().print(__version__, highlight=False)
        return 0
    word = arguments[0] if arguments else "run"
    if ranks is not None and word in commands and word != "run":
        raise ConfigError(f"'{word}' takes one process; start it without torchrun")
    if word in commands:
        return commands[word](arguments[1:])
    if late := next((text for text in arguments if text in commands), None):
        raise ConfigError(f"the command comes first: claq-exp {late} ...")
    if word.isidentifier():
        known = ", ".join(commands)
        raise ConfigError(f"'{word}' is no command; choose one of: {known}, or write KEY=VALUE")
    return _run(arguments, ranks)


def _run(arguments: list[str], ranks: Ranks | None) -> int:
    from claq_exp.sweep.server import start_server

    swept = any(
        word in ("-m", "--multirun") or word.startswith("sweep=") or lists_seeds(word)
        for word in arguments
    )
    if (
        swept
        and ranks is None
        and not any(word.startswith("hydra/launcher=") for word in arguments)
    ):
        start_server()  # a launcher's processes have servers of their own

    from claq_exp.compose.experiment import compose_unless_sweep
    from claq_exp.compose.options import own_folders

    words, command = read_words(arguments), _command(arguments)
    with own_folders(words.folders):
        if words.printed:
            from claq_exp.sweep.run import print_config

            print_config(words)
            return 0
        config = None if words.multirun else compose_unless_sweep(words.overrides)
        if config is None:
            if words.verbose:
                raise ConfigError("-v shows the tensors of one run; leave it out of a sweep")
            if ranks is not None:
                raise ConfigError(
                    "a sweep takes one process; hydra/launcher= runs jobs side by side"
                )
            from claq_exp.sweep.run import run_sweep

            return run_sweep(words.overrides, command, seeds=words.seeds)
        _run_one(config, command, ranks, verbose=words.verbose)
        if not arguments:
            Console().print("Next: claq-exp experiment=claq_2.12", highlight=False)
    return 0


def _run_one(config: ExperimentConfig, command: str, ranks: Ranks | None, *, verbose: bool) -> None:
    """Run one experiment and print its table."""
    from claq_exp.reporting.tables import result_notes, result_table
    from claq_exp.run.runner import run
    from claq_exp.system.distributed import ALONE
    from claq_exp.tracking.progress import RunProgress, own_stderr

    with own_stderr() as stream:
        show = partial(Console(file=stream).print, highlight=False, markup=False, soft_wrap=True)
        outcome = run(
            config,
            command,
            show,
            progress=partial(RunProgress, verbose=verbose),
            ranks=ranks or ALONE,
        )
    console = Console()
    if outcome.found:
        console.print("This run was finished before; resume=never runs it again.", highlight=False)
    console.print(result_table(outcome.results))
    if config.model.remark:
        console.print(f"Note: {config.model.remark}.", highlight=False)
    _print_notes(console, [*result_notes(outcome.results), *outcome.notes])
    for name in ("results.json", "layers.csv", "layers.png", "checkpoint"):
        if (path := outcome.folder / name).exists():
            console.print(str(path), highlight=False, markup=False, soft_wrap=True)


def _print_notes(console: Console, notes: Iterable[str]) -> None:
    for line in notes:
        console.print(f"Note: {line}", highlight=False, markup=False, soft_wrap=True)


def _composed(command: str, arguments: list[str]) -> ExperimentConfig:
    """Compose the one experiment that a command is about."""
    from claq_exp.compose.experiment import compose_config
    from claq_exp.compose.options import own_folders

    words = only_overrides(command, arguments)
    with own_folders(words.folders):
        return compose_config(words.overrides)


def _plan(arguments: list[str]) -> int:
    from claq_exp.reporting.tables import plan_table
    from claq_exp.run.plan import plan_for
    from claq_exp.system.machine import choose_device
    from claq_exp.tracking.progress import own_stderr

    words, seeds = first_seed(arguments)
    config = _composed("plan", words)
    with own_stderr() as stream:
        show = partial(Console(file=stream).print, highlight=False, markup=False, soft_wrap=True)
        plan = plan_for(config, choose_device(config.device), show)
    console = Console()
    console.print(plan_table(plan))
    runs = f"{len(seeds)} runs, one for each seed; the table is of one of them"
    _print_notes(console, [*plan.notes, *[runs] * (len(seeds) > 1)])
    return 0


def _report(arguments: list[str]) -> int:
    from claq_exp.reporting.command import report_command

    return report_command(arguments)


def _evaluate(arguments: list[str]) -> int:
    from claq_exp.reporting.tables import result_notes, result_table
    from claq_exp.run.evaluate import evaluate_checkpoint

    named = any(word.startswith(("model=", "model.source=")) for word in arguments)
    found = evaluate_checkpoint(
        _composed("evaluate", arguments), _command(["evaluate", *arguments]), named=named
    )
    console = Console()
    console.print(result_table(found.results))
    for line in (*result_notes(found.results), *found.notes):
        console.print(f"Note: {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(str(found.path), highlight=False, markup=False, soft_wrap=True)
    return 0


def _inspect(arguments: list[str]) -> int:
    from claq_exp.checkpoint.summary import summarize
    from claq_exp.foreign.found import find_foreign
    from claq_exp.foreign.ledger import read_ledger
    from claq_exp.reporting.foreign_tables import foreign_tables, linears_table
    from claq_exp.reporting.plots import plot_columns
    from claq_exp.reporting.tables import layers_table, summary_tables
    from claq_exp.run_folder.find import checkpoint_folder

    usage = (
        "inspect needs one folder or GGUF file: claq-exp inspect PATH [--layers] [--plot FILE.png]"
    )
    words, picture = list(arguments), None
    if "--plot" in words:
        place = words.index("--plot")
        chosen, words = words[place + 1 : place + 2], words[:place] + words[place + 2 :]
        if not chosen or not chosen[0].endswith(".png"):
            raise ConfigError(usage)
        picture = Path(chosen[0])
    folders = [word for word in words if word != "--layers"]
    if len(folders) != 1 or folders[0].startswith("-"):
        raise ConfigError(usage)
    console, notes = Console(), list[str]()
    foreign = find_foreign(folders[0])
    if foreign is not None:
        ledger = read_ledger(foreign, trust_remote_code=False)
        path, tables, layers = foreign.path, foreign_tables(foreign, ledger), linears_table(ledger)
        rows, notes = [linear.row() for linear in ledger.linears], ledger.notes()
    else:
        summary = summarize(checkpoint_folder(folders[0]))
        path, tables = summary.folder, summary_tables(summary)
        layers = layers_table([*summary.layers, *summary.ends])
        rows = [layer.row() for layer in summary.layers]
    console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    for table in [*tables, layers] if "--layers" in words else tables:
        console.print(table)
    _print_notes(console, notes)
    if picture:
        plot_columns(rows, picture)
        console.print(str(picture), highlight=False, markup=False, soft_wrap=True)
    return 0


def _export(arguments: list[str]) -> int:
    from claq_exp.cli.export import export_command

    return export_command(arguments)


def _bench(arguments: list[str]) -> int:
    from claq_exp.reporting.bench import generation_table, linear_table
    from claq_exp.runtime.bench import TOKENS, bench_checkpoint

    if arguments[:1] != ["runtime"]:
        raise ConfigError("bench needs to know what: claq-exp bench runtime checkpoint=FOLDER")
    note, console = Console(stderr=True), Console()
    benched = bench_checkpoint(
        _composed("bench runtime", arguments[1:]),
        on_step=lambda step: note.print(step, highlight=False),
    )
    console.print(benched.device, highlight=False, markup=False)
    console.print(generation_table(benched.generation, TOKENS))
    console.print(linear_table(benched.linears))
    return 0


def _fetch(arguments: list[str]) -> int:
    from claq_exp.compose.experiment import compose_unless_sweep
    from claq_exp.compose.options import own_folders
    from claq_exp.models.load import look_at
    from claq_exp.reporting.tables import input_lines
    from claq_exp.run.inputs import fetch, reads_the_same
    from claq_exp.sources.cache import fetch_log
    from claq_exp.sweep.grid import check_grid
    from claq_exp.tracking.progress import noise_to, own_stderr

    words, console = read_words(arguments), Console()
    if words.verbose:
        raise ConfigError("-v goes with run: claq-exp run -v")
    with own_folders(words.folders):
        config = None if words.multirun else compose_unless_sweep(words.overrides)
        configs = (config,) if config else check_grid(words.overrides).configs
    inputs: dict[str, None] = {}
    remarks: dict[str, None] = {}
    with own_stderr() as stream, noise_to(fetch_log()):
        show = partial(Console(file=stream).print, highlight=False, markup=False, soft_wrap=True)
        for config in {reads_the_same(config): config for config in configs}.values():
            fetched = fetch(config, show, show)
            inputs |= dict.fromkeys(input_lines(fetched.inputs))
            remote = config.model.trust_remote_code
            original = look_at(fetched.model, trust_remote_code=remote, strict=config.strict)
            remarks |= dict.fromkeys(original.remarks())
    for line in inputs:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    _print_notes(console, remarks)
    return 0


def _help(arguments: list[str]) -> int:
    from claq_exp.compose.options import groups, own_folders

    console = Console()
    console.print(USAGE, highlight=False, markup=False, soft_wrap=True)
    with own_folders(folders_of(arguments)):
        known = groups()
    for group, options in known.items():
        console.print(
            f"{group:<12} {', '.join(options)}", highlight=False, markup=False, soft_wrap=True
        )
    return 0


def _command(arguments: list[str]) -> str:
    processes = place().local_size
    if processes > 1:
        start = f"torchrun --nproc-per-node {processes} -m claq_exp"
        return f"{start} {shlex.join(arguments)}".rstrip()
    return shlex.join(["claq-exp", *arguments])


def _complain_of(error: Exception, arguments: list[str]) -> int:
    """Say what went wrong and return the exit code."""
    if isinstance(error, ClaqError):
        _complain(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        _complain(f"{error.filename or 'a file'}: {error.strerror or telling_line(error)}")
    else:
        from claq_exp.cli.bugs import explain_bug

        _complain(explain_bug(error, _command(arguments)))
    return ClaqError.exit_code


def _complain(message: str) -> None:
    Console(stderr=True).print(
        f"claq-exp: {message}", highlight=False, markup=False, soft_wrap=True
    )


if __name__ == "__main__":
    sys.exit(main())
