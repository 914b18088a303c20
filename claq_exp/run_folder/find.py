"""Which checkpoint a person means."""

from __future__ import annotations

from pathlib import Path

from claq_exp.checkpoint.reader import read_layouts
from claq_exp.errors import ConfigError
from claq_exp.run_folder import CHECKPOINT, FINISHED, run_state


def checkpoint_folder(folder: str | Path) -> Path:
    """Return the checkpoint that a person means: the folder itself, or the one of a run's folder.

    Raises ConfigError when there is none.
    """
    path = Path(folder).expanduser()
    if not path.exists():
        raise ConfigError(f"'{path}' does not exist; name a checkpoint or the folder of a run")
    if not path.is_dir():
        raise ConfigError(f"'{path}' is no folder; name a checkpoint or the folder of a run")
    inside = path / CHECKPOINT
    chosen = inside if (inside / "config.json").is_file() else path
    state = run_state(path)
    if chosen == path and state is not None:
        why = f" ({state.reason})" if state.reason else ""
        again = "" if state.name == FINISHED else "; the run's command goes on with it"
        raise ConfigError(f"'{path}' is a run without a checkpoint: it is {state.name}{why}{again}")
    if not (chosen / "config.json").is_file() and (runs := _runs_in(path)):
        raise ConfigError(f"'{path}' holds runs, {len(runs)} in all; name one, e.g. {runs[0]}")
    read_layouts(chosen)
    return chosen


def _runs_in(path: Path) -> list[Path]:
    """Return the runs with a checkpoint that a folder holds."""
    return sorted(found.parent.parent for found in path.glob(f"*/{CHECKPOINT}/config.json"))
