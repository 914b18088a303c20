"""The kernel as the GPU's compiler sees it: the interpreter accepts more than the compiler does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from claq_exp.quantize.kernels.column_step import quantize_column

rows, bits, reserves, scaled = map(int, sys.argv[1:])
chosen = dict(
    padded=rows, bits=bits, block_size=128, compensated=True,
    reserves=bool(reserves), scaled=bool(scaled), weighted=bool(scaled),
)
types = dict(
    codes="*u8", levels="*fp16", plan="*i32", first_row="*i32", first="*i32", scratch="*i64"
)
signature = {}
for name in quantize_column.arg_names:
    if name in chosen:
        signature[name] = "constexpr"
    elif name.endswith("_ptr"):
        signature[name] = types.get(name.removesuffix("_ptr"), "*fp32")
    else:
        signature[name] = "i32"
source = ASTSource(quantize_column, signature, constexprs=chosen)
compiled = triton.compile(
    source,
    target=GPUTarget("cuda", 90, 32),
    options={"num_warps": 8, "maxnreg": 255, "enable_fp_fusion": True},
)
print(len(compiled.asm["cubin"]) > 0, compiled.metadata.shared)
"""


@pytest.mark.parametrize(
    ("rows", "bits", "reserves", "scaled"), [(4096, 2, 0, 0), (4096, 4, 1, 0), (512, 6, 1, 1)]
)
def test_the_kernel_compiles_for_hopper(tmp_path, rows, bits, reserves, scaled):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    script = tmp_path / "compile.py"  # a kernel's source must be readable from a file
    script.write_text(COMPILE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, (rows, bits, reserves, scaled))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built, shared = done.stdout.split()
    assert built == "True"
    assert int(shared) < 48 * 1024
