"""A program that plans for, and opens, models whose folder was damaged at random.

    python damaged_models.py FOLDER OF MODELS, WORKPLACE, TEXT, ROUNDS

It writes a line of JSON for each damage.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from functools import partial
from pathlib import Path

import damages
import torch

import claq_exp.run.plan
import claq_exp.run.shape
from claq_exp.compose.experiment import compose_config
from claq_exp.models.load import load_config, open_model
from claq_exp.run.inputs import fetch, tokenize_inputs

claq_exp.run.shape.matmul_speed = lambda device: 1e11


def words(model: Path, text: Path) -> list[str]:
    return [
        *("model=hf", f"model.source={model}", "model.dtype=float32"),
        *("calibration=text", f"calibration.path={text}"),
        *("calibration.windows=2", "calibration.seqlen=16", "evaluation=none", "tracking=none"),
    ]


def use(model: Path, text: Path, work: Path) -> str:
    """Do what a run does before it quantizes."""
    config = compose_config(words(model, text))
    fetched = fetch(config)
    model_config = load_config(fetched.model)
    claq_exp.run.plan.make_plan(config, model_config, "cpu")
    tokens = tokenize_inputs(config, fetched.model)
    opened = open_model(fetched.model, work, dtype="float32", device="cpu")
    with torch.inference_mode():
        opened.load()(tokens.calibration)
    return "opened"


def damage(folder: Path, kind: str, dice: random.Random) -> None:
    """Damage a file: its bytes, those of a safetensors header, or an entry of JSON data."""
    names = {"edit": "*.json", "header": "*.safetensors", "config": "config.json"}
    path = dice.choice(sorted(folder.glob(names.get(kind, "*"))))
    content = path.read_bytes()
    if kind == "header":
        header = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(damages.flip(content[:header], dice) + content[header:])
    elif kind in ("edit", "config"):
        data = json.loads(content)
        damages.edit_json(data, dice)
        path.write_text(json.dumps(data))
    else:
        path.write_bytes(damages.BYTES[kind](content, dice))


def main(originals: list[Path], place: Path, text: Path, rounds: int) -> None:
    for original in originals:
        for kind in (*damages.BYTES, "header", "edit", "config", "config"):
            for seed in range(rounds):
                folder = Path(shutil.copytree(original, place / "damaged"))
                damage(folder, kind, random.Random(f"{original.name} {kind} {seed}"))
                (place / "opened").mkdir()
                found = damages.outcome(partial(use, folder, text, place / "opened"))
                damages.say(model=original.name, damage=kind, seed=seed, outcome=found)
                shutil.rmtree(folder)
                shutil.rmtree(place / "opened")


if __name__ == "__main__":
    main(
        sorted(Path(sys.argv[1]).iterdir()), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    )
