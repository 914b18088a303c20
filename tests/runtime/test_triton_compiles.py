"""The product kernels as the GPU's compiler sees them; the interpreter accepts more."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import json
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from claq_exp.runtime.kernels import triton_decode, triton_dense

def shared_memory(capability, name, warps, absent, chosen):
    kernel = getattr(triton_dense if name == "dequantize" else triton_decode, name)
    chosen = {**chosen, **{f"{pointer}_ptr": None for pointer in absent}}
    types = dict(
        inputs="*fp16" if chosen.get("narrow") else "*bf16", outputs="*bf16", weight="*bf16",
        codes="*i32", columns="*i32", starts="*i32", places="*i32",
    )
    signature = {}
    for argument in kernel.arg_names:
        if argument in chosen:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = types.get(argument.removesuffix("_ptr"), "*fp32")
        else:
            signature[argument] = "i32"
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=chosen),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True},
    )
    assert len(compiled.asm["cubin"]) > 0
    return compiled.metadata.shared

found = {}
for case, arguments in json.load(sys.stdin).items():
    try:
        found[case] = shared_memory(*arguments)
    except Exception as error:
        found[case] = str(error)
json.dump(found, sys.stdout)
"""


def constants(width: int, batch: int, lanes: int = 8, **others: object) -> dict[str, object]:
    run_rows = 32 // (width & -width)
    words = run_rows * width // 32
    sizes = {"width": width, "words": words, "run_rows": run_rows}
    return {**sizes, "batch": batch, "lanes": lanes, "unroll": 2, **others}


def joint(width: int, batch: int, joined: int, runs: int) -> dict[str, object]:
    return constants(width, batch, joined=joined, runs=runs)


def tiles(width: int, precision: str, narrow: bool) -> dict[str, object]:
    return constants(width, 16, 16, precision=precision, narrow=narrow)


KERNELS = {
    "one input, pairs of 2 bits": (90, "sum_joint_lookups", 8, [], joint(2, 1, 2, 2)),
    "two inputs, fours of 1 bit": (80, "sum_joint_lookups", 8, ["columns"], joint(1, 2, 4, 1)),
    "two inputs, 3 bits": (90, "sum_lookups", 8, ["columns"], constants(3, 2)),
    "four inputs, 2 bits": (80, "sum_lookups", 8, [], constants(2, 4)),
    "one input, 8 bits": (80, "sum_lookups", 8, [], constants(8, 1)),
    "a uniform grid": (100, "sum_lookups", 8, ["columns", "levels"], constants(4, 2)),
    "tensor cores, TF32": (90, "sum_tiles", 8, [], tiles(4, "tf32", False)),
    "tensor cores, float16": (100, "sum_tiles", 8, ["levels"], tiles(6, "tf32", True)),
    "tensor cores, float32": (80, "sum_tiles", 8, [], tiles(2, "tf32x3", False)),
    "sums of partial sums": (90, "finish", 4, [], {"height": 32, "depth": 32}),
    "a dense copy": (90, "dequantize", 4, [], {"width": 5, "height": 64, "depth": 32}),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, int | str]:
    """Shared memory of every kernel in bytes, or what the compiler said."""
    folder = tmp_path_factory.mktemp("compile")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    script = folder / "compile_kernels.py"
    script.write_text(COMPILE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        input=json.dumps(KERNELS),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", KERNELS)
def test_a_kernel_compiles(compiled, case):
    assert isinstance(compiled[case], int), compiled[case]
    assert compiled[case] <= 96 * 1024  # two programs fit a multiprocessor
