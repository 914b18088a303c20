"""Compiles Triton kernels for GPUs that are not there, and says what they take of them.

Triton needs no device for that.  It needs a process of its own where the kernels of this one are
interpreted: `build` starts this file once for each architecture.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """What a program may take.

    shared: bytes of shared memory.  registers: of a multiprocessor, 32 bits each.  threads: most
    of a program.
    """

    backend: str
    name: int | str
    warp: int
    shared: int
    registers: int
    threads: int = 1024


ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 32, 163 * KIB, 65536),
    "sm_90": Architecture("cuda", 90, 32, 227 * KIB, 65536),
    "gfx942": Architecture("hip", "gfx942", 64, 64 * KIB, 131072),
}


@dataclass(frozen=True)
class Case:
    """A kernel with all that is fixed when it is compiled.

    kernel: module:name.  constants: its constexpr arguments; of a pointer that is left out None.
    options: of the launch.  types: of arguments that are no float32 pointer and no int32
    number.  aligned: arguments that 16 divides.
    """

    kernel: str
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    types: Mapping[str, str] = field(default_factory=dict)
    aligned: Sequence[str] = ()


@dataclass(frozen=True)
class Built:
    """What the compiler made of a case.

    shared: bytes.  registers: of a thread.  spilled: bytes of a thread that are kept in memory in
    place of registers.  code: assembly, PTX or AMDGCN.  error: what the compiler said in place of
    all that.
    """

    shared: int = 0
    registers: int = 0
    spilled: int = 0
    code: str = ""
    error: str = ""


def kernels_of(package: str) -> dict[str, Any]:
    """Return module:name -> kernel of every `@triton.jit` function of a package."""
    folder = Path(str(importlib.import_module(package).__file__)).parent
    found = {}
    for source in sorted(folder.rglob("*.py")):
        if "@triton.jit" not in source.read_text(encoding="utf-8"):
            continue
        path = ".".join((package, *source.relative_to(folder).with_suffix("").parts))
        for name, value in vars(importlib.import_module(path)).items():
            made = getattr(value, "fn", None)
            if made is not None and getattr(made, "__module__", None) == path:
                found[f"{path}:{name}"] = value
    return found


def used_by(kernel: Any) -> set[Any]:
    """Return a kernel, and all kernels that are compiled into it."""
    found, left = set[Any](), [kernel]
    while left:
        one = left.pop()
        if one in found:
            continue
        found.add(one)
        around = one.fn.__globals__
        named = [around.get(name) for name in one.fn.__code__.co_names]
        left += [other for other in named if hasattr(other, "fn")]
    return found


def build(cases: Mapping[str, Case], architecture: str) -> dict[str, Built]:
    """Compile cases for an architecture, in one process: name -> what came of it."""
    request = {name: asdict(case) for name, case in cases.items()}
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        environment["TRITON_CACHE_DIR"] = folder
        done = subprocess.run(
            [sys.executable, __file__, architecture],
            env=environment,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {name: Built(**made) for name, made in json.loads(done.stdout).items()}


def _compile(case: Case, architecture: Architecture) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    module, _, name = case.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    signature = {}
    for argument in kernel.arg_names:
        if argument in case.constants:
            signature[argument] = "constexpr"
        else:
            default = "*fp32" if argument.endswith("_ptr") else "i32"
            signature[argument] = case.types.get(argument, default)
    divisible = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.aligned
    }
    target = GPUTarget(architecture.backend, architecture.name, architecture.warp)
    known = make_backend(target).parse_options(dict(case.options)).__dict__
    for option in case.options:
        if option not in known:  # as a launch would say
            raise KeyError(f"Keyword argument {option} was specified but unrecognised")
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=dict(case.constants), attrs=divisible),
        target=target,
        options=dict(case.options),
    )
    shared = compiled.metadata.shared
    if architecture.backend == "hip":
        code = compiled.asm["amdgcn"]
        registers = _count(code, "vgpr_count")
        return Built(shared, registers, _count(code, "private_segment_fixed_size"), code)
    registers, stack = _resources(compiled.asm["cubin"])
    return Built(shared, registers, stack, compiled.asm["ptx"])


def _count(code: str, what: str) -> int:
    (found,) = re.findall(rf"^\s*\.{what}:\s*(\d+)", code, re.MULTILINE)
    return int(found)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread and the bytes of its stack."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    (registers,), (stack,) = re.findall(r"REG:(\d+)", told), re.findall(r"STACK:(\d+)", told)
    return int(registers), int(stack)


def _main() -> None:
    architecture = ARCHITECTURES[sys.argv[1]]
    found = {}
    for name, described in json.load(sys.stdin).items():
        try:
            found[name] = _compile(Case(**described), architecture)
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises
            found[name] = Built(error=f"{type(error).__name__}: {error}")
    json.dump({name: asdict(made) for name, made in found.items()}, sys.stdout)


if __name__ == "__main__":
    _main()
