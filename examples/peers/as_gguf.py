"""The original as a GGUF file in float16, which llama.cpp's quantizer takes.

    python examples/peers/as_gguf.py TARGET.gguf [WORDS]

WORDS are those of the command line that name the model: model=...  For other models than those of
`claq-exp export format=gguf`, use convert_hf_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import claq_exp
from claq_exp.export.gguf import write_opened
from claq_exp.models.load import open_model


def main(target: str, *words: str) -> None:
    """Write the file; it must not exist."""
    folder = Path(claq_exp.calibration_inputs(*words).model)
    with TemporaryDirectory() as work:
        opened = open_model(folder, Path(work), dtype="float32", device="cpu")
        write_opened(opened, folder, Path(target), dtype="float16")


if __name__ == "__main__":
    main(*sys.argv[1:])
