"""Rows of the six tasks in the schema of the hub: made up, or real ones where they are at hand."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

from conftest import WORDS

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "zeroshot"
FILES = {
    "piqa": "piqa.validation",
    "arc_easy": "arc_easy.test",
    "arc_challenge": "arc_challenge.test",
    "boolq": "boolq.validation",
    "hellaswag": "hellaswag.validation",
    "winogrande": "winogrande_xl.validation",
}
SPLITS = {name: "test" if name.startswith("arc") else "validation" for name in FILES}
HUB = {
    "piqa": ("baber/piqa", None),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "boolq": ("aps/super_glue", "boolq"),
    "hellaswag": ("Rowan/hellaswag", None),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
}


def real_rows(name: str, count: int) -> list[dict]:
    """The first rows of the real task; none where they are not at hand."""
    path = REAL / f"{FILES[name]}.jsonl.gz"
    if not path.is_file():
        return []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def made_rows(name: str, count: int, seed: int = 0) -> list[dict]:
    """Rows with right answers and lengths of all kinds."""
    generator = random.Random(seed)

    def phrase(words: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(words))

    def phrases(number: int) -> list[str]:
        return [phrase(1 + generator.randrange(4)) for _ in range(number)]

    def piqa(_: int) -> dict:
        first, second = phrases(2)
        return {
            "goal": phrase(4),
            "sol1": first,
            "sol2": second,
            "label": generator.randrange(2),
        }

    def arc(number: int) -> dict:
        labels = ["A", "B", "C", "D"][: 3 + number % 2]
        return {
            "id": f"row {number}",
            "question": phrase(5),
            "choices": {"text": phrases(len(labels)), "label": labels},
            "answerKey": generator.choice(labels),
        }

    def boolq(number: int) -> dict:
        return {
            "question": phrase(4),
            "passage": phrase(6),
            "idx": number,
            "label": generator.randrange(2),
        }

    def hellaswag(number: int) -> dict:
        return {
            "ind": number,
            "activity_label": f"{phrase(2)} [title] {phrase(1)}",
            "ctx_a": phrase(4),
            "ctx_b": phrase(2),
            "endings": [f"{text} [step]  {phrase(1)}" for text in phrases(4)],
            "label": str(generator.randrange(4)),
        }

    def winogrande(_: int) -> dict:
        first, second = phrases(2)
        return {
            "sentence": f"{phrase(3)} _ {phrase(3)}",
            "option1": first,
            "option2": second,
            "answer": str(1 + generator.randrange(2)),
        }

    makers = {
        "piqa": piqa,
        "arc_easy": arc,
        "arc_challenge": arc,
        "boolq": boolq,
        "hellaswag": hellaswag,
        "winogrande": winogrande,
    }
    return [makers[name](number) for number in range(count)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
