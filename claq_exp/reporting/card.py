"""The model card of a checkpoint: README.md, as the model hub shows it.

It depends on the run alone: no date, no path of this machine.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from claq_exp import __version__
from claq_exp.reporting.tables import result_notes, result_rows
from claq_exp.run_folder import NEUTRAL
from claq_exp.sources.hub import is_hub_name
from claq_exp.sources.paths import looks_like_path

RECIPE = (
    *("codebook", "precision", "reservation", "solver", "objective", "allocation", "budget"),
    *("embedding", "head", "transform", "activation", "tune", "calibration"),
)
SILENT = ("batch_size", "keep_in")  # settings that are about the machine
UNASKED = {"float64": False}  # settings that are told where they are something else
UNUSED = {"none", "same", "plain"}  # names of options that do nothing
FLAGS = ("-v", "--verbose", "--debug", "run")
ONE_PATH = re.compile(r"('?\"?)(?:~|\.{1,2})?/[^,\[\]{}]*?([^/,\[\]{}]+)\1")
FOLDERS = re.compile(r"(?<![\w:./])(?:~|\.{1,2})?(?:/[^\s/,'\"\]}]+)*/(?=[^\s/,'\"\]}])")
LOAD_IT = "## Load it"
LOADING = """\
import claq_exp
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
"""


def model_card(
    config: Mapping[str, Any],
    command: str,
    bits: Mapping[str, float],
    size: int,
    results: Mapping[str, Any] | None = None,
) -> str:
    """Return the card of a checkpoint.

    config: plain data.  command: as it was typed.  bits: nominal, linear and model bits per weight.
    size: bytes.  results: of the run, once they are known.
    """
    name = config["model"]["name"]
    parts = [
        _front_matter(config["model"]["source"]),
        f"# {name}, {bits['linear']:.2f} bits per weight",
        f"{_base(config['model'])}, quantized with `claq_exp` {__version__}.",
        _bits(bits, size),
        "## Results",
        "Not measured yet." if results is None else _results(results),
        "## How it was made",
        f"```sh\n{plain_command(command)}\n```",
        _recipe(config),
        LOAD_IT,
        "The linear layers stay packed in memory. Install `claq_exp`, and import it first: without "
        "the import, transformers fills the layers with random numbers.",
        f"```python\n{LOADING}```",
        "`claq-exp export FOLDER TARGET` writes it for programs that do not know packed weights.",
    ]
    return "\n\n".join(parts) + "\n"


def exported_card(text: str, about: str) -> str:
    """Return the card of what was exported from a checkpoint with the card `text`.

    about: what stands in place of how the checkpoint is loaded.
    """
    kept = text.partition(f"\n{LOAD_IT}\n")[0].rstrip("\n")
    return f"{kept}\n\n## This folder\n\n{about}\n"


def _front_matter(source: str) -> str:
    """Return what the hub reads; a model that is not of the hub has no name there."""
    lines = [f"base_model: {source}", "base_model_relation: quantized"]
    tags = ["claq", "quantized", "text-generation"]
    return "\n".join(
        [
            "---",
            *(lines if _on_hub(source) else []),
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            *(f"- {tag}" for tag in tags),
            "---",
        ]
    )


def _on_hub(source: str) -> bool:
    return not looks_like_path(source) and is_hub_name(source)


def _base(model: Mapping[str, Any]) -> str:
    source, remark = str(model["source"]), f" ({model['remark']})" if model.get("remark") else ""
    if _on_hub(source):
        revision = f"@{model['revision']}" if model.get("revision") else ""
        return f"[{source}{revision}](https://huggingface.co/{source}){remark}"
    last = _placeless(source)
    return f"{model['name']}{'' if last == model['name'] else f', from `{last}`'}{remark}"


def _bits(bits: Mapping[str, float], size: int) -> str:
    rows = [
        ("nominal: codes and reserved entries, as papers print them", bits["nominal"]),
        ("linear: all that is stored for the quantized layers", bits["linear"]),
        ("model: the whole checkpoint over all parameters", bits["model"]),
    ]
    table = [f"| {what} | {value:.3f} |" for what, value in rows]
    return "\n".join(
        ["| bits per weight | |", "| --- | ---: |", *table, f"| size, MB | {size / 1e6:.1f} |"]
    )


def _results(results: Mapping[str, Any]) -> str:
    rows = [row for row in result_rows(dict(results)) if "bits per" not in row[0]]
    table = ["| | original | quantized |", "| --- | ---: | ---: |"]
    table += [f"| {' | '.join(row)} |" for row in rows]
    notes = [f"* {FOLDERS.sub('', note)}" for note in result_notes(dict(results))]
    return "\n".join(table) + ("\n\n" + "\n".join(notes) if notes else "")


def _recipe(config: Mapping[str, Any]) -> str:
    """Return a row for each group of settings that does something."""
    rows = []
    for group in RECIPE:
        settings = dict(config[group])
        name = settings.pop("name", "")
        given = {
            key: value
            for key, value in settings.items()
            if value not in (None, "") and key not in SILENT and UNASKED.get(key) is not value
        }
        if name in UNUSED or (group == "budget" and settings["bits"] is None):
            continue
        words = ", ".join(f"{key}={_placeless(_shown(value))}" for key, value in given.items())
        rows.append(f"| {group} | {' '.join([f'**{name}**'] if name else [])} | {words} |")
    table = ["| | | settings |", "| --- | --- | --- |", *rows]
    return "\n".join([*table, f"| seed | | {config['seed']} |"])


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if value is not None and str(value).isspace() else str(value)


def plain_command(command: str) -> str:
    """Return a command without the words that change no result, and without folders of a machine.

    Several processes make the same checkpoint as one.
    """
    words = shlex.split(command.replace("python -m claq_exp", "claq-exp"))
    if "claq_exp" in words:  # torchrun
        words = ["claq-exp", *words[words.index("claq_exp") + 1 :]]
    kept = []
    for word in words:
        key = word.lstrip("+~").partition("=")[0].split(".")[0]
        if word in FLAGS or ("=" in word and (key in NEUTRAL or key.startswith("hydra"))):
            continue
        kept.append(_placeless(word))
    return shlex.join(kept)


def _placeless(text: str) -> str:
    """Leave of each absolute or relative path its last part; addresses and hub names stay."""
    key, equals, value = text.rpartition("=")
    if one := ONE_PATH.fullmatch(value):
        return f"{key}{equals}{one[2]}"
    return FOLDERS.sub("", text)
