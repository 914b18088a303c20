"""The commands of README and docs, and what makes miniatures of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from claq_exp.cli import main
from claq_exp.compose.seeds import spread_seeds
from claq_exp.sweep.grid import check_grid

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "results" / "README.md"]
WITHOUT_OVERRIDES = ("report", "inspect", "export")
SHRUNK = ("model", "calibration", "evaluation", "tracking", "corpus@evaluation")  # by the tiny run
FOLDER = "outputs/default/RUN"
SWEPT = ("sweep=", "seeds=")


def jobs_of(words: Sequence[str]) -> int:
    """Compose what words ask for, and return the jobs; the files of sweeps/ have their own test."""
    overrides, _ = spread_seeds([word for word in words if "=" in word])
    name = overrides[0].removeprefix("sweep=")
    if len(overrides) == 1 and (ROOT / "sweeps" / f"{name}.yaml").is_file():
        return 1  # or more: test_conf_files.py composes every job
    return check_grid(overrides).jobs


@dataclass(frozen=True)
class Command:
    """A command of a document: the page, and the words behind `claq-exp`."""

    page: str
    words: tuple[str, ...]

    @property
    def is_sweep(self) -> bool:
        return "-m" in self.words or any(word.startswith(SWEPT) for word in self.words)

    @property
    def has_overrides(self) -> bool:
        return self.words[0] not in WITHOUT_OVERRIDES

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def lines_of(page: Path) -> list[str]:
    """Return the indented lines of a page that are commands, those in several parts as one."""
    text = page.read_text().replace("\\\n", " ")
    found = re.findall(r"^    ((?:claq-exp|torchrun|python benchmarks/|[A-Z_]+=).*)$", text, re.M)
    return [line.partition("   #")[0].strip() for line in found]


def commands_of(*pages: Path) -> list[Command]:
    """Return every command of pages once."""
    found = {}
    for page in pages:
        for line in lines_of(page):
            words = tuple(word for word in shlex.split(line) if word != "...")
            if words[0] == "claq-exp":
                found.setdefault(words[1:], Command(str(page.relative_to(ROOT)), words[1:]))
    return list(found.values())


def shrunk(words: list[str], tiny: list[str]) -> list[str]:
    """Let the tiny run's model, texts and sizes take the place of the command's."""
    groups = {word: word.lstrip("+~").partition("=")[0].split(".")[0] for word in words}
    kept = [word for word in words if groups[word] not in SHRUNK]
    tight = ("budget.bits=", "experiment=linear/", "experiment=best/free_3.", "sweep=recipe_search")
    if any(word.startswith(tight) for word in kept):
        kept.append("budget.bits=13")  # in so few rows codebooks and header weigh more than codes
    return [*kept, *(word for word in tiny if not word.startswith("outputs="))]


def few(words: list[str], most: int) -> list[str]:
    """Let a sweep have `most` values of each key; its file has as many as its command then."""
    kept = []
    for word in words:
        key, _, values = word.partition("=")
        given = values.split(",") if key != "-m" else [values]
        kept.append(f"{key}={','.join(given[:most])}" if values else word)
        if key == "sweep" and (ROOT / "sweeps" / f"{values}.yaml").is_file():
            params = yaml.safe_load((ROOT / "sweeps" / f"{values}.yaml").read_text())["hydra"]
            chosen = {other.partition("=")[0].lstrip("+") for other in words}
            for name, text in params["sweeper"]["params"].items():
                if name not in chosen and "(" not in str(text):
                    kept.append(f"{name}={','.join(str(text).split(',')[:most])}")
    return [re.sub(r"n_trials=\d+", "n_trials=2", word) for word in kept]


def run(command: Command, tiny: list[str], values: int = 1) -> int:
    """Run a command in the working directory, where `outputs/default` has a run."""
    found = min(Path("outputs/default").glob("*3.5-reserve*/results.json"))
    words = [word.replace(FOLDER, str(found.parent)) for word in command.words]
    if not command.has_overrides:
        return main([word.replace("wikitext2", "wikipedia") for word in words])  # the tiny run's
    checkpoint = [word for word in words if word.startswith("checkpoint=")]
    rest = [word for word in words if word not in checkpoint]
    if command.is_sweep:
        rest = few(rest, values)
    return main([*shrunk(rest, tiny), *checkpoint])


def write_options(folder: Path) -> None:
    """Write the files of docs/sweeps.md, where each line is that of the file named before it."""
    block = re.search(r"^    mine/\n((?:      .*\n)+)", (ROOT / "docs/sweeps.md").read_text(), re.M)
    path = folder
    for line in block[1].splitlines():
        if named := line[6:33].strip():
            path = folder / named
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(line[33:] + "\n")
