"""claq-exp export."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from claq_exp.errors import ConfigError, check_choice, one_of
from claq_exp.run_folder.find import checkpoint_folder

TRUST = "model.trust_remote_code"
USAGE = "claq-exp export FOLDER TARGET [format=dense] [dtype=float16]"


def export_command(arguments: list[str]) -> int:
    """Write a checkpoint in the format of other programs; see `claq_exp.export`."""
    from claq_exp.checkpoint.reader import read_rounding
    from claq_exp.export import chosen, export

    folders = [word for word in arguments if "=" not in word]
    options = {"format": "dense", "dtype": "", TRUST: "false"}
    for word in arguments:
        key, equals, value = word.partition("=")
        if equals and key not in options:
            raise ConfigError(one_of("export: option", key, options))
        if equals:
            options[key] = value
    if len(folders) != 2 or any(folder.startswith("-") for folder in folders):
        raise ConfigError(f"export needs a folder and a target: {USAGE}")
    check_choice(TRUST, options[TRUST].lower(), ("false", "true"))
    chosen(options["format"], options["dtype"] or None)
    target = Path(folders[1]).expanduser()
    folder, console = checkpoint_folder(folders[0]), Console()
    export(
        folder,
        target,
        options["format"],
        dtype=options["dtype"] or None,
        trust_remote_code=options[TRUST].lower() == "true",
    )
    console.print(str(target), highlight=False, markup=False, soft_wrap=True)
    if read_rounding(folder) is not None:
        console.print("Note: a plain folder does not round activations, as this checkpoint does.")
    return 0
