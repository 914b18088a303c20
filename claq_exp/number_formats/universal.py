"""The codebooks that come with the package, and those of a file."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.number_formats.formats import BlockFormat
from claq_exp.number_formats.lo_bcq import round_codebooks

UNIVERSAL, LOCAL = "universal", "local"
FILE = Path(__file__).with_name("universal.json")
DIGITS = 4  # of a codeword in a file, over the largest magnitude of an array


def design_name(block_format: BlockFormat) -> str:
    """Return the key of a design in a file: bits, array, block and number of codebooks."""
    return "/".join(
        f"{number}"
        for number in (
            block_format.bits,
            block_format.array,
            block_format.block,
            block_format.codebooks,
        )
    )


def read_codebooks(books: str, block_format: BlockFormat) -> Tensor:
    """Return codebooks for a format: [codebooks, 2**bits] float32 of `codeword_bits` bits.

    books: `universal`, or the path of a file of the same form.
    Raises ConfigError where the file has none for this format.
    """
    path = codebook_file(books) or FILE
    designs = _read(path)
    name = design_name(block_format)
    if name not in designs:
        alike = [key for key in designs if key.startswith(f"{block_format.bits}/")] or [*designs]
        raise ConfigError(
            f"books={books} has no codebooks for bits/array/block/codebooks = {name}; there are: "
            f"{', '.join(sorted(alike))}; choose one of them, or books=local"
        )
    found = torch.tensor(designs[name], dtype=torch.float64)
    if found.shape != (block_format.codebooks, 2**block_format.bits):
        raise ConfigError(f"{path}: {name} is not {block_format.codebooks} codebooks")
    return round_codebooks(found, block_format.codeword_bits)


def codebook_file(books: object) -> Path | None:
    """Return the file that `books` names, or None where it names none."""
    if not isinstance(books, str) or books in (UNIVERSAL, LOCAL):
        return None
    return Path(books).expanduser()


@cache
def _read(path: Path) -> dict[str, Any]:
    try:
        designs = json.loads(path.read_text(encoding="utf-8"))["designs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"books={path} cannot be read as codebooks: {error}") from error
    if not isinstance(designs, dict):
        raise ConfigError(f"books={path} must map designs to codebooks")
    return designs
