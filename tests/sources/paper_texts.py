"""WikiText-2, C4 and Penn Treebank in small, as files of people and as repositories of the hub."""

from __future__ import annotations

import gzip
import io
import json
import random

import pyarrow
import pyarrow.parquet
from conftest import WORDS

CARD = """\
---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: test, path: wikitext-2-raw-v1/test-*}
  - {split: train, path: wikitext-2-raw-v1/train-*}
---
"""
SPLITS = ("train", "validation", "test")


def words(number: int, seed: int) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(number))


RAW = "".join(f" \n = Part {part} = \n \n {words(40, part)} \n" for part in range(20))
SENTENCES = "".join(f" {words(12, seed)} \n" for seed in range(40))
DOCUMENTS = {
    f"{split}.{shard}": [f"{split} {shard} é 😀 " + words(60, n) for n in range(8)]
    for split in SPLITS[:2]
    for shard in range(3)
}


def c4_shard(documents: list[str]) -> bytes:
    rows = [{"text": text, "timestamp": "2019-04-25", "url": "a.b"} for text in documents]
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


def table(column: str, rows: list[str]) -> bytes:
    target = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({column: rows}), target)
    return target.getvalue()


def wikitext() -> dict[str, bytes]:
    rows = [line if line.strip() else "" for line in io.StringIO(RAW)]  # as the data set was made
    files = {"README.md": CARD.encode()}
    for split in SPLITS:
        own = rows if split == "test" else [f" {split} \n", *rows]
        files[f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"] = table("text", own)
    return files


def c4() -> dict[str, bytes]:
    number = {"train": 1024, "validation": 8}
    files = {}
    for key, documents in DOCUMENTS.items():
        split, shard = key.split(".")
        files[f"en/c4-{split}.{int(shard):05}-of-{number[split]:05}.json.gz"] = c4_shard(documents)
    return {"README.md": b"---\nlicense: odc-by\n---\n"} | files


def ptb() -> dict[str, bytes]:
    rows = [line.strip() for line in io.StringIO(SENTENCES)]
    return {
        f"penn_treebank/{split}/0000.parquet": table(
            "sentence", rows if split == "validation" else [split, *rows]
        )
        for split in SPLITS
    }
