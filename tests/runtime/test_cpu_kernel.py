"""The CPU kernel against float64 products with the dequantized matrix."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packed_matrices import operand, random_weight
from torch import Tensor

from claq_exp.payload import RowGrid
from claq_exp.payload.columns import ColumnPayload, Reserved
from claq_exp.runtime.kernels import build, cpu
from claq_exp.runtime.kernels.cpu import CpuKernel

PATHS = {"avx512": ("-march=native",), "avx2": ("-mavx2", "-mfma"), "portable": ()}
CHUNK = 32  # of cpu.c
UNIT = 2.0**-24  # relative error of one float32 operation


def can_run(path: str) -> bool:
    """Tell whether this machine compiles and runs the code of a path."""
    library = build.library(PATHS[path])
    flags = Path("/proc/cpuinfo")
    known = flags.read_text() if flags.exists() else ""
    library.claq_path.restype = ctypes.c_char_p
    runs = {"avx512": "avx512bw", "avx2": " fma "}.get(path, "")
    return library.claq_path().decode() == path and runs in known


@pytest.fixture(params=PATHS, scope="module")
def kernel(request: pytest.FixtureRequest) -> CpuKernel:
    """The kernel on each set of instructions that this machine has."""
    if not build._compilers():
        pytest.skip("no C compiler")
    if not can_run(request.param):
        pytest.skip(f"this machine has no {request.param}")
    return CpuKernel(PATHS[request.param])


@pytest.fixture
def native() -> CpuKernel:
    """The kernel as users get it."""
    if not build._compilers():
        pytest.skip("no C compiler")
    return CpuKernel()


def matrix(
    rows: int,
    columns: int,
    widths: list[int],
    kind: str = "columns",
    *,
    scaled: bool = False,
    reserved: float = 0.0,
    group_size: int = 64,
) -> ColumnPayload:
    """A random matrix of a kind: columns (codebooks), shared (codebooks), grid, table or rows."""
    return random_weight(
        rows,
        columns,
        widths,
        reserved=reserved,
        shared=kind == "shared",
        row_scales=scaled,
        group_size=group_size if kind in ("grid", "table") else 0,
        table=kind == "table",
        by_row=kind == "rows",
        seed=rows + columns + sum(widths),
    )


def exact_and_bound(weight: ColumnPayload, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The float64 product, and how far a float32 sum may be from it.

    Each summand goes through at most one chunk of additions, one addition per chunk, those of the
    row's reserved entries, and a few roundings of levels, scales and products; the error is then
    at most UNIT * roundings * sum |summand|.  A reserved entry's code 0 is added and taken off; a
    grid's code and zero are separate summands.
    """
    x = inputs.double()
    dense = weight.dequantize().double()
    plain = replace(weight, reserved=Reserved.none(weight.codes.shape[1])).dequantize().double()
    sizes = dense.abs() + 2 * plain.abs()
    chunks = len(weight.column_bits) // CHUNK + 8  # the last ones of each width are short
    if isinstance(weight, RowGrid):
        group = torch.arange(weight.codes.shape[1]) // weight.group_size
        tops = weight.codes.double() + weight.zeros.double()[:, group]
        sizes += 2 * weight.scales.double().abs()[:, group] * tops
        chunks += weight.scales.shape[1]
    most = int(torch.bincount(weight.reserved.rows, minlength=1).max())
    roundings = 2 * CHUNK + chunks + most + 8  # twice: a grid's sum of x and sum of codes
    return x @ dense.t(), UNIT * roundings * (x.abs() @ sizes.t()) * 1.01 + 1e-30


def check(kernel: CpuKernel, weight: ColumnPayload, inputs: Tensor) -> Tensor:
    """Multiply, compare, and return the outputs."""
    packed = operand(weight)
    assert kernel.refusal(packed) is None
    outputs = kernel.multiply(packed, inputs)
    assert outputs.dtype == inputs.dtype
    assert outputs.shape == (len(inputs), weight.codes.shape[0])
    exact, bound = exact_and_bound(weight, inputs)
    if inputs.dtype != torch.float32:
        info = torch.finfo(inputs.dtype)
        bound = bound + (exact.abs() + bound) * info.eps / 2 + info.smallest_normal
    misses = (outputs.double() - exact).abs()
    assert bool((misses <= bound).all()), float((misses / bound).max())
    return outputs


@pytest.mark.parametrize("kind", ["columns", "shared", "grid", "table", "rows"])
@pytest.mark.parametrize("width", range(1, 9))
def test_every_width(kernel: CpuKernel, width: int, kind: str) -> None:
    """Each code width, with partial vectors and a short last group.

    For one row, for several that share a look-up, and for more, which share what was looked up.
    """
    weight = matrix(205, 150, [width], kind, scaled=kind in ("columns", "shared"), reserved=0.02)
    for batch in (1, 3, 5, 19):
        check(kernel, weight, torch.randn(batch, 150))


@pytest.mark.case(71)
@pytest.mark.parametrize("widths", [[2, 4], [1, 3, 5], [3, 8], [4, 2, 6]])
def test_mixed_widths(kernel: CpuKernel, widths: list[int]) -> None:
    """Columns of several widths in any order."""
    for scaled, reserved in ((False, 0.0), (True, 0.01)):
        weight = matrix(121, 200, widths, scaled=scaled, reserved=reserved)
        for batch in (1, 3):
            check(kernel, weight, torch.randn(batch, 200))
    for size in (7, 48):
        weight = matrix(121, 200, widths, "table", reserved=0.01, group_size=size)
        for batch in (1, 3):
            check(kernel, weight, torch.randn(batch, 200))


@pytest.mark.case(71)
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 5, 16, 33])
def test_batches(kernel: CpuKernel, batch: int) -> None:
    """Any number of activation rows, none included."""
    check(kernel, matrix(96, 130, [2, 4], reserved=0.01), torch.randn(batch, 130))
    check(kernel, matrix(96, 130, [4], "grid", group_size=48), torch.randn(batch, 130))


@pytest.mark.case(71)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 70), (49, 1), (49, 576), (7, 64), (576, 33), (130, 128)]
)
def test_shapes(kernel: CpuKernel, shape: tuple[int, int]) -> None:
    """Rows that fill no vector or no byte, and chunks that are not full."""
    for width in (1, 2, 3, 4, 5, 6, 7, 8):
        check(kernel, matrix(*shape, [width], reserved=0.05), torch.randn(2, shape[1]))
        check(kernel, matrix(*shape, [width]), torch.randn(18, shape[1]))
        check(kernel, matrix(*shape, [width], "grid", group_size=24), torch.randn(1, shape[1]))
        for batch in (1, 3):
            check(
                kernel, matrix(*shape, [width], "rows", reserved=0.05), torch.randn(batch, shape[1])
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_input_types(kernel: CpuKernel, dtype: torch.dtype) -> None:
    """Outputs have the type of the inputs, sums are float32; strided inputs are taken."""
    weight = matrix(49, 96, [3], scaled=True)
    check(kernel, weight, torch.randn(2, 96).to(dtype))
    check(kernel, weight, torch.randn(96, 2).to(dtype).t())


def test_the_number_of_threads_changes_no_bit(kernel: CpuKernel) -> None:
    """A row's sums have one order."""
    weight = matrix(1000, 300, [2, 4], scaled=True, reserved=0.01)
    packed = operand(weight)
    threads = torch.get_num_threads()
    for batch in (1, 6):
        inputs = torch.randn(batch, 300)
        results = []
        try:
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                results.append(kernel.multiply(packed, inputs))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_threads_are_those_of_torch(native: CpuKernel) -> None:
    """One thread where torch has one or there is little to do, and never more than torch's."""
    multiply = cpu._multiply(native.instructions)
    for rows, most in ((16, 1), (1024, 4)):
        packed = operand(matrix(rows, 128, [2]))
        x, y = torch.randn(1, 128), torch.empty(1, rows)
        places = cpu.prepare(packed).address, 1, x.data_ptr(), y.data_ptr()
        assert multiply(*places, 1) == 1
        assert 1 <= multiply(*places, 4) <= most


@pytest.mark.case(71)
@pytest.mark.skipif(sys.platform != "linux", reason="protects a page through Linux's libc")
@pytest.mark.parametrize("width", range(1, 9))
def test_nothing_is_read_beyond_the_codes(kernel: CpuKernel, width: int) -> None:
    """The codes end where a page that cannot be read begins."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    page = mmap.PAGESIZE
    for rows, kind in [(rows, kind) for rows in (49, 128, 1, 203) for kind in ("columns", "rows")]:
        weight = matrix(rows, 20, [width], kind)
        packed = operand(weight)
        (part,) = packed.parts
        size = part.codes.numel()
        pages = -(-size // page)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = libc.mmap(None, (pages + 1) * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        libc.mprotect(ctypes.c_void_p(base + pages * page), ctypes.c_size_t(page), 0)
        place = (ctypes.c_uint8 * size).from_address(base + pages * page - size)
        codes = torch.frombuffer(place, dtype=torch.uint8).reshape(part.codes.shape)
        codes.copy_(part.codes)
        guarded = replace(packed, parts=(replace(part, codes=codes),))
        for batch in (1, 4):
            inputs = torch.randn(batch, 20)
            expected = kernel.multiply(packed, inputs)
            assert torch.equal(kernel.multiply(guarded, inputs), expected)
        del guarded, codes
        libc.munmap(ctypes.c_void_p(base), ctypes.c_size_t((pages + 1) * page))


def test_refusals(native: CpuKernel) -> None:
    """Matrices that need clamping or lie elsewhere are refused."""
    packed = operand(matrix(8, 8, [2]))
    assert "largest float16" in str(native.refusal(replace(packed, clamps=True)))
    (part,) = packed.parts
    away = replace(packed, parts=(replace(part, codes=part.codes.to("meta")),))
    assert "meta" in str(native.refusal(away))


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache and nothing remembered."""
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(tmp_path / "cache"))
    build._outcome.cache_clear()
    yield tmp_path
    build._outcome.cache_clear()


def test_no_compiler_is_one_line(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler the kernel says so."""
    monkeypatch.setenv("PATH", str(fresh_build))
    refusal = CpuKernel().refusal(operand(matrix(8, 8, [2])))
    assert refusal is not None
    assert "needs a C compiler" in refusal
    assert "\n" not in refusal


def compiler(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a shell script the only compiler."""
    file = folder / "bin" / "cc"
    file.parent.mkdir()
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(build, "COMPILERS", ("cc",))
    monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")


def test_a_failed_compile_is_one_line(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own words are in the refusal, and nothing stays in the cache."""
    compiler(
        fresh_build, "echo one >&2; echo 'cpu.c:1: error: no such thing' >&2; exit 1", monkeypatch
    )
    refusal = CpuKernel().refusal(operand(matrix(8, 8, [2])))
    assert refusal == "the CPU kernel does not compile: cc: cpu.c:1: error: no such thing"
    assert not list(fresh_build.rglob("*.so"))


def small_source(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Compile something quick in place of the kernel."""
    source = folder / "small.c"
    source.write_text("int answer(void) { return 42; }\n")
    monkeypatch.setattr(build, "SOURCE", source)


def test_libraries_are_kept(
    native: CpuKernel, fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process finds the library of the first, without compiling."""
    small_source(monkeypatch, fresh_build)
    assert build.library(()).answer() == 42
    (kept,) = (fresh_build / "cache" / "kernels").iterdir()
    build._outcome.cache_clear()
    monkeypatch.setattr(build, "_compile", None)
    assert build.library(()).answer() == 42
    assert kept.name.startswith("cpu-")


def test_a_compiler_without_openmp(
    native: CpuKernel, fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP is left out where the compiler does not know it."""
    small_source(monkeypatch, fresh_build)
    real = build._compilers()[0]
    compiler(fresh_build, f'case "$*" in *-fopenmp*) exit 1;; esac; exec {real} "$@"', monkeypatch)
    assert build.library(()).answer() == 42


def test_an_unwritable_cache(
    native: CpuKernel, fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another folder is used where the cache cannot be written."""
    small_source(monkeypatch, fresh_build)
    (fresh_build / "cache").write_text("a file, not a folder")
    assert build.library(()).answer() == 42


def test_prepared_matrices_go_with_their_operands(native: CpuKernel) -> None:
    """What the kernel keeps of an operand does not outlive it."""
    packed = operand(matrix(8, 8, [2], reserved=0.1))
    native.multiply(packed, torch.randn(1, 8))
    gc.collect()
    before = len(cpu._prepared)
    del packed
    gc.collect()
    assert len(cpu._prepared) == before - 1
