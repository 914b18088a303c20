"""A program that reads texts of every kind of file after random damages.

    python damaged_texts.py FOLDER OF TEXTS, WORKPLACE, ROUNDS

It writes a line of JSON for each damage.
"""

from __future__ import annotations

import random
import sys
from functools import partial
from pathlib import Path

import damages

from claq_exp.sources.text import TextSource, read_documents


def read(path: Path) -> str:
    documents = read_documents(TextSource(path=str(path)))
    if not all(isinstance(document, str) for document in documents):
        return "a document that is no text"
    return "read"


def main(originals: list[Path], place: Path, rounds: int) -> None:
    for original in originals:
        content = original.read_bytes()
        path = place / original.name
        for name, damage in damages.BYTES.items():
            for seed in range(rounds):
                path.write_bytes(damage(content, random.Random(f"{original.name} {name} {seed}")))
                found = damages.outcome(partial(read, path))
                damages.say(file=original.name, damage=name, seed=seed, outcome=found)


if __name__ == "__main__":
    main(sorted(Path(sys.argv[1]).iterdir()), Path(sys.argv[2]), int(sys.argv[3]))
