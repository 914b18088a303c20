"""The kernels as compilers of GPUs see them; the interpreter accepts more than these do.

By default a launch or two of every kernel, for an A100 and an MI300X, and more for an H100;
`--every-launch` compiles all that the project can make.
"""

from __future__ import annotations

import re
from functools import cache

import pytest

pytest.importorskip("triton")

from ahead_of_time import ARCHITECTURES, Built, Case, build, kernels_of, used_by
from launches import every, usual


@cache
def built(architecture: str, whole: bool) -> dict[str, Built]:
    return build((every if whole else usual)(architecture), architecture)


@pytest.fixture(params=ARCHITECTURES)
def launches(request) -> tuple[str, dict[str, Built]]:
    return request.param, built(request.param, request.config.getoption("--every-launch"))


@pytest.mark.case(148)
def test_every_kernel_has_a_launch_that_is_compiled():
    kernels = kernels_of("claq_exp")
    assert len(kernels) > 20
    for architecture in ARCHITECTURES:
        compiled = set()
        for case in usual(architecture).values():
            compiled |= used_by(kernels[case.kernel])
        assert [name for name, kernel in kernels.items() if kernel not in compiled] == []


@pytest.mark.case(148)
def test_launches_compile_and_keep_what_they_hold_in_registers(launches):
    name, found = launches
    limits = ARCHITECTURES[name]
    cases = every(name)
    for what, made in found.items():
        assert not made.error, (what, made.error)
        assert made.shared <= limits.shared, what
        threads = limits.warp * cases[what].options["num_warps"]
        assert threads <= limits.threads, what
        assert made.registers * threads <= limits.registers, what
        if not _too_tall(cases[what]):
            assert made.spilled == 0, what


def _too_tall(case: Case) -> bool:
    """Tell launches of which it is known that a multiprocessor's registers do not hold a column."""
    rows, bits = case.constants.get("padded", 0), case.constants.get("bits", 0)
    return rows > 4096 or (rows == 4096 and bits >= 4 and case.constants["scaled"])


def test_products_leave_room_for_a_second_program(launches):
    name, found = launches
    for what, made in found.items():
        if ":sum_" in every(name)[what].kernel:
            assert 2 * made.shared <= ARCHITECTURES[name].shared, what


def test_blocks_are_rounded_as_ieee_754_says():
    found = built("sm_90", False)
    for what, element in (("a choice of codebooks", "bf16"), ("no choice of codebooks", "f32")):
        code = found[what].code
        assert "div.rn.f32" in code
        assert ("cvt.rn.bf16" in code) == (element == "bf16")
        assert not re.search(r"div\.full|div\.approx|fma\.rn\.f32|\.ftz", code)
