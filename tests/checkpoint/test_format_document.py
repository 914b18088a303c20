"""docs/format.md: its examples are what the code stores, byte by byte."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from claq_exp.checkpoint.reader import parse_layouts
from claq_exp.checkpoint.writer import FORMAT_VERSION, QUANT_METHOD
from claq_exp.payload import PAYLOAD, unpack_weight

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
DTYPES = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}
EXAMPLES = {
    section.partition("\n")[0]: section
    for section in DOCUMENT.partition("\n## Examples\n")[2].split("\n### ")[1:]
}


def stored_in(section: str) -> dict[str, torch.Tensor]:
    tensors = {}
    rows = re.findall(r"^\| (\w+) \| (U8|F16|F32) \[([\d, ]+)\] \| ([0-9A-F ]+) \|$", section, re.M)
    for name, dtype, shape, content in rows:
        flat = torch.frombuffer(bytearray.fromhex(content), dtype=DTYPES[dtype])
        tensors[name] = flat.reshape([int(length) for length in shape.split(",")])
    return tensors


def layout_in(section: str):
    (text,) = re.findall(r"```json\n(.*?)```", section, re.S)
    described = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
    return parse_layouts({**described, "modules": {"x": json.loads(text)}})["x"]


def test_there_are_examples_of_all_payloads():
    layouts = [layout_in(section) for section in EXAMPLES.values()]
    assert {layout.kind for layout in layouts} == set(PAYLOAD)
    assert any(layout.reserved for layout in layouts)


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_unpacks_to_the_matrix_that_stands_below_it(title):
    weight = unpack_weight(layout_in(EXAMPLES[title]), stored_in(EXAMPLES[title]))
    rows = EXAMPLES[title].partition("| W |")[2].splitlines()[2:]
    expected = [[float(cell) for cell in row.strip("| ").split("|")] for row in rows if row]
    assert weight.dequantize().tolist() == expected


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_packs_to_the_same_bytes(title):
    stored = stored_in(EXAMPLES[title])
    packed = unpack_weight(layout_in(EXAMPLES[title]), stored).pack()
    assert set(packed) == set(stored)
    for name, tensor in packed.items():
        assert tensor.numpy().tobytes() == stored[name].numpy().tobytes(), name


def test_the_example_of_a_config_is_read():
    (text,) = re.findall(r"```json\n(\{\n  \"quant_method\".*?)```", DOCUMENT, re.S)
    (layout,) = parse_layouts(json.loads(text)).values()
    assert (layout.rows, layout.columns) == (576, 576)


def test_the_version_of_the_document_is_the_one_that_is_written():
    assert DOCUMENT.startswith(f"# The checkpoint format, version {FORMAT_VERSION}\n")
