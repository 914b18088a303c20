"""Run tests as other processors would: `python tests/processors/matrix.py [options] [tests ...]`.

    python tests/processors/matrix.py                 # what is sensitive to rounding
    python tests/processors/matrix.py --all -- -x     # everything; what follows -- is pytest's
    python tests/processors/matrix.py --only portable --only pretend-1 tests/quantize

Each combination sets what libraries choose by the processor: the instructions of torch's own
kernels (ATEN_CPU_CAPABILITY), of MKL (MKL_CBWR) and of oneDNN (ONEDNN_MAX_CPU_ISA), the kernels of
numpy's and scipy's OpenBLAS (OPENBLAS_CORETYPE), the instructions that numba compiles for
(NUMBA_CPU_NAME) and the number of threads (OMP_NUM_THREADS).  Every value of each occurs at least
once; a processor without AVX-512 runs those combinations with what it has.  The `pretend` ones
move the last bits of torch's results instead, see pretend_processor.py.

Compiled column loops are kept apart by NUMBA_CACHE_DIR, and made anew.  Prints a row per
combination as it ends, and on the standard error the tests that failed; exits with 1 if any did.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
SENSITIVE = {
    "calibration": "moments_accumulator",
    "quantize": (
        "adaptive_precision block_formats claq_reference column_loop extreme_weights "
        "gptq_solver group_table lo_bcq moments one_dimensional_clustering outlier_reservation "
        "rate_distortion real_zero_points scale_and_shift sklearn_codebook solver_of_ones_own "
        "strategy_conformance svid symmetric_matrices uniform_grid"
    ),
    "kernels": "block_rounding device_columns",
    "models": (
        "activations block_gradients device_maps experts model_quantization overlay "
        "packed_architectures solving_a_group streaming survey tuned_norms"
    ),
    "payload": "payload_conformance",
    "transform": "folding smooth",
    "runtime": (
        "cpu_kernel huggingface_loading quantized_linear spread_checkpoints treated_models "
        "triton_kernel"
    ),
    "checkpoint": (
        "checkpoint_commands golden_checkpoint golden_matrices packed_checkpoint "
        "rounded_activations stored_matrices"
    ),
    "evaluation": "divergence_oracle perplexity_oracle zero_shot_tasks",
    "distributed": "quantization_by_ranks runs_by_ranks",
    "devices": "device_runs parts_on_a_device products_on_a_device",
    "faults": "determinism numerics",
}


def sensitive() -> list[str]:
    """Return their paths.  Raises FileNotFoundError for one that has moved."""
    paths = [
        f"tests/{part}/test_{name}.py" for part in SENSITIVE for name in SENSITIVE[part].split()
    ]
    if gone := [path for path in paths if not (ROOT / path).is_file()]:
        raise FileNotFoundError(", ".join(gone))
    return paths


def settings(
    torch: str = "",
    mkl: str = "",
    onednn: str = "",
    openblas: str = "",
    numba: str = "",
    threads: int = 1,
) -> dict[str, str]:
    """Environment variables; what is empty is left to the library."""
    chosen = {
        "ATEN_CPU_CAPABILITY": torch,
        "MKL_CBWR": mkl,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "OPENBLAS_CORETYPE": openblas,
        "NUMBA_CPU_NAME": numba,
        "OMP_NUM_THREADS": str(threads),
    }
    return {key: value for key, value in chosen.items() if value}


COMPATIBLE = "COMPATIBLE"
COMBINATIONS = {
    "plain": settings(),
    "portable": settings("default", COMPATIBLE, "SSE41", "Prescott", "generic", 1),
    "sse": settings("default", "", "", "Nehalem", "", 4),
    "avx2": settings("avx2", "", "AVX2", "Haswell", "", 2),
    "avx2-compatible": settings("avx2", COMPATIBLE, "AVX2", "Zen", "generic", 4),
    "avx512": settings("avx512", "", "", "SkylakeX", "", 2),
    "avx512-compatible": settings("avx512", COMPATIBLE, "AVX", "Sandybridge", "", 1),
    "pretend-1": {"PRETEND": "1", **settings()},
    "pretend-2": {"PRETEND": "2", **settings(openblas="Haswell", threads=2)},
}
LIBRARIES = [*settings("x", "x", "x", "x", "x"), "PRETEND"]


@dataclass
class Outcome:
    """What pytest said."""

    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)


def outcome(report: Path, returned: int) -> Outcome:
    """Read pytest's report; a run without one has failed as a whole."""
    if not report.exists():
        return Outcome(failed=[f"pytest ended with {returned} and no report"])
    found = Outcome()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            found.failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            found.skipped += 1
        else:
            found.passed += 1
    return found


def run(name: str, tests: list[str], options: list[str]) -> Outcome:
    chosen = COMBINATIONS[name]
    with tempfile.TemporaryDirectory(prefix="processors-") as folder:
        environment = {key: value for key, value in os.environ.items() if key not in LIBRARIES}
        environment |= {**chosen, "NUMBA_CACHE_DIR": f"{folder}/numba"}
        environment["OMP_WAIT_POLICY"] = "passive"  # more threads than cores: none may spin
        if "PRETEND" in chosen:
            options = ["-p", "pretend_processor", *options]
            paths = [str(Path(__file__).parent), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, f"--junitxml={report}", *options, *tests],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        return outcome(report, done.returncode)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    words = [*sys.argv[1:], "--"]
    at = words.index("--")
    words, options = words[:at], words[at + 1 : -1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", help="files and folders in place of the sensitive ones")
    parser.add_argument("--all", action="store_true", help="the whole suite")
    parser.add_argument("--only", action="append", choices=COMBINATIONS, help="may be repeated")
    chosen = parser.parse_args(words)
    tests = ["tests"] if chosen.all else chosen.tests or sensitive()
    failed = False
    say("| combination | settings | passed | failed | skipped | seconds |")
    say("| --- | --- | ---: | ---: | ---: | ---: |")
    for name in chosen.only or COMBINATIONS:
        started = time.monotonic()
        found = run(name, tests, options)
        shown = " ".join(f"{key}={value}" for key, value in COMBINATIONS[name].items())
        counts = f"{found.passed} | {len(found.failed)} | {found.skipped}"
        say(f"| {name} | {shown} | {counts} | {time.monotonic() - started:.0f} |")
        for test in found.failed:
            sys.stderr.write(f"{name}: {test}\n")
        failed |= bool(found.failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
