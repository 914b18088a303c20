"""Every launch of the project's kernels, as the project makes it: name -> case."""

from __future__ import annotations

import itertools

import torch
from ahead_of_time import ARCHITECTURES, Case

from claq_exp.number_formats import block_rounding
from claq_exp.number_formats.formats import E2M1, INTEGER, LEARNED, BlockFormat
from claq_exp.number_formats.table import FormatCodebooks
from claq_exp.quantize.solver.device import WIDEST
from claq_exp.quantize.solver.device_columns import launch_options
from claq_exp.runtime.kernels import triton as products
from claq_exp.runtime.kernels.triton_operand import TritonOperand, TritonPart

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
DECODE = "claq_exp.runtime.kernels.triton_decode"
LO_BCQ = BlockFormat(4, 64, "e4m3", LEARNED, 8, 16, 6)
NVFP4 = BlockFormat(4, 16, "e4m3", E2M1)
FORMATS = {
    "lo_bcq": LO_BCQ,
    "lo_bcq of two": BlockFormat(2, 16, "e4m3", LEARNED, 4, 2, 6),
    "nvfp4": NVFP4,
    "mxfp4": BlockFormat(4, 32, "e8m0", E2M1),
    "rows": BlockFormat(8, 0, "e8m0", INTEGER),
}
SIZES = {"small": (576, 576), "large": (8192, 8192)}  # rows and columns of a part


def column_case(
    rows: int, bits: int, *, reserves: bool, scaled: bool, rocm: bool, compensated: bool = True
) -> Case:
    """The column loop; rows: a power of two."""
    return Case(
        "claq_exp.quantize.kernels.column_step:quantize_column",
        {
            "padded": rows,
            "bits": bits,
            "block_size": 128,
            "compensated": compensated,
            "reserves": reserves,
            "scaled": scaled,
            "weighted": scaled,
        },
        launch_options(rows, bits, rocm=rocm),
        {
            "codes_ptr": "*u8",
            "levels_ptr": "*fp16",
            "plan_ptr": "*i32",
            "first_row_ptr": "*i32",
            "first_ptr": "*i32",
            "scratch_ptr": "*i64",
        },
    )


def product_case(
    width: int,
    n: int,
    dtype: torch.dtype,
    *,
    rocm: bool,
    size: str = "large",
    some: bool = True,
    grid: bool = False,
    half: bool = True,
    by_row: bool = False,
) -> Case:
    """Sums over a part.  some: it has some of the columns.  grid: its codes are their own levels.

    half: float16 holds every level.  by_row: levels of rows.
    """
    rows, columns = SIZES[size]
    codes = torch.empty(columns, -(-rows * width // 32), dtype=torch.int32, device="meta")
    own = torch.empty(1, device="meta") if by_row else None
    part = TritonPart(width, None, codes, None, half, own)
    whole = TritonOperand(rows, columns, (part,), None, None, None, 132)
    launch = products._launch_of(whole, part, n, products.default_tuning())
    constants = {**launch.constants}
    if launch.kernel == "sum_tiles":
        constants |= products.tile_constants(dtype, half=half, rocm=rocm)
    constants |= {"columns_ptr": None} if not some else {}
    constants |= {"levels_ptr": None} if grid or by_row else {}
    constants |= {} if by_row else {"row_levels_ptr": None}
    types = {"inputs_ptr": TYPES[dtype], "codes_ptr": "*i32", "columns_ptr": "*i32"}
    options = {"num_warps": launch.warps, "num_stages": 1, "enable_fp_fusion": True}
    return Case(f"{DECODE}:{launch.kernel}", constants, options, types)


def finish_case(dtype: torch.dtype, *, bare: bool = False, table: bool = False) -> Case:
    """The sums of sums.

    bare: no scales, no grid and nothing reserved.  table: a scale for each group, and no zeros.
    """
    names: tuple[str, ...] = ("row_scales", "offsets", "group_sums", "starts", "places", "changes")
    names += () if table else ("grid_scales", "split_groups")
    absent = {f"{name}_ptr": None for name in names} if bare or table else {}
    return Case(
        f"{DECODE}:finish",
        {"height": products.FINISH_ROWS, "depth": products.FINISH_DEPTH, **absent},
        {"num_warps": 4, "enable_fp_fusion": True},
        {
            "inputs_ptr": TYPES[dtype],
            "outputs_ptr": TYPES[dtype],
            "starts_ptr": "*i32",
            "places_ptr": "*i32",
            "split_groups_ptr": "*i32",
        },
    )


def dense_case(
    width: int,
    dtype: torch.dtype,
    *,
    grid: bool = False,
    table: bool = False,
    chosen: bool = False,
    by_row: bool = False,
) -> Case:
    """A dense copy of rows that follow each other, or of chosen ones.

    grid: codes are their own levels.  table: levels with a scale for each group.
    by_row: levels of rows.
    """
    absent: tuple[str, ...] = ("levels",) if grid or by_row else ()
    absent += ("zeros",) if table else () if grid else ("grid_scales", "zeros")
    absent += () if by_row else ("row_levels",)
    absent += () if chosen else ("rows",)
    return Case(
        "claq_exp.runtime.kernels.triton_dense:dequantize",
        {"width": width, **products.DENSE_TILE, **{f"{name}_ptr": None for name in absent}},
        {"num_warps": 4, "enable_fp_fusion": False},
        {
            "columns_ptr": "*i32",
            "codes_ptr": "*i32",
            "weight_ptr": TYPES[dtype],
            **({"rows_ptr": "*i64"} if chosen else {}),
        },
    )


def rounding_case(block_format: BlockFormat, dtype: torch.dtype, columns: int = 4096) -> Case:
    """Rounding to a block format."""
    books = torch.zeros(block_format.codebooks, 2**block_format.bits)
    block, launch = block_rounding._launch(FormatCodebooks(block_format, books), columns)
    chosen = dict(launch)
    options = {"num_warps": chosen.pop("num_warps"), "enable_fp_fusion": False}
    width = 1 << (block_format.codebooks - 1).bit_length()
    return Case(
        "claq_exp.number_formats.block_rounding:round_blocks",
        {"block": block, "books": width, **chosen},
        options,
        {"source_ptr": TYPES[dtype], "target_ptr": TYPES[dtype], "resolution": "fp32"},
        ("source_ptr", "target_ptr", "steps_ptr", "table_ptr", "columns"),
    )


def usual(architecture: str) -> dict[str, Case]:
    """Return some launches of every kernel, those that a default run makes among them."""
    rocm = ARCHITECTURES[architecture].backend == "hip"
    half = torch.float16
    cases = {
        "a column of 4,096 rows, 2 bits": column_case(
            4096, 2, reserves=False, scaled=False, rocm=rocm
        ),
        "one input, 2 bits": product_case(2, 1, half, rocm=rocm),
        "four inputs, 4 bits": product_case(4, 4, half, rocm=rocm),
        "tensor cores, float32": product_case(2, 16, torch.float32, rocm=rocm),
        "sums of partial sums": finish_case(torch.bfloat16),
        "a dense copy": dense_case(5, torch.bfloat16),
        "rows of an embedding": dense_case(8, half, chosen=True),
        "a choice of codebooks": rounding_case(LO_BCQ, torch.bfloat16),
    }
    if architecture == "sm_90":
        cases |= {
            "a column with reserved entries, 4 bits": column_case(
                4096, 4, reserves=True, scaled=False, rocm=rocm
            ),
            "a column of scaled rows": column_case(512, 5, reserves=True, scaled=True, rocm=rocm),
            "two inputs, fours of 1 bit": product_case(1, 2, half, rocm=rocm, some=False),
            "two inputs, 3 bits": product_case(3, 2, half, rocm=rocm),
            "one input, 8 bits": product_case(8, 1, half, rocm=rocm),
            "sums of a group table": finish_case(half, table=True),
            "a dense copy of a group table": dense_case(4, half, table=True),
            "a uniform grid": product_case(4, 2, half, rocm=rocm, some=False, grid=True),
            "tensor cores, float16": product_case(6, 16, half, rocm=rocm),
            "tensor cores, 3 bits": product_case(3, 16, torch.bfloat16, rocm=rocm),
            "tensor cores, bfloat16": product_case(4, 16, torch.bfloat16, rocm=rocm),
            "no choice of codebooks": rounding_case(NVFP4, torch.float32),
            "levels of rows, 2 bits": product_case(2, 1, half, rocm=rocm, some=False, by_row=True),
            "tensor cores, levels of rows": product_case(
                4, 16, half, rocm=rocm, some=False, by_row=True
            ),
            "a dense copy, levels of rows": dense_case(3, half, by_row=True),
        }
    return cases


def every(architecture: str) -> dict[str, Case]:
    """Return every launch: heights of powers of two, widths, types, and what may be left out."""
    rocm = ARCHITECTURES[architecture].backend == "hip"
    cases = {}
    for height, bits, others in itertools.product(
        [128 << step for step in range(9)], range(1, WIDEST + 1), (False, True)
    ):
        cases[f"column {height} {bits} {others}"] = column_case(
            height, bits, reserves=others, scaled=others, rocm=rocm, compensated=True
        )
    cases["column nearest"] = column_case(
        4096, 2, reserves=True, scaled=False, rocm=rocm, compensated=False
    )
    for width, n, size in itertools.product(range(1, 9), (1, 2, 4), SIZES):
        cases[f"product {width} {n} {size}"] = product_case(
            width, n, torch.float16, rocm=rocm, size=size
        )
    for width, n in itertools.product(range(1, 9), (1, 4, 16)):
        cases[f"grid {width} {n}"] = product_case(
            width, n, torch.bfloat16, rocm=rocm, some=False, grid=True
        )
    for width, dtype, half in itertools.product(range(1, 9), TYPES, (True, False)):
        part = TritonPart(width, None, torch.empty(0), None, half)
        whole = TritonOperand(0, 0, (part,), None, None, None, 1)
        if products.too_wide(whole, 16, dtype):
            continue
        cases[f"tiles {width} {dtype} {half}"] = product_case(
            width, 16, dtype, rocm=rocm, half=half
        )
    for width, dtype, grid in itertools.product(range(1, 9), TYPES, (True, False)):
        cases[f"dense {width} {dtype} {grid}"] = dense_case(width, dtype, grid=grid)
    for width, dtype in itertools.product(range(1, 9), TYPES):
        cases[f"dense {width} {dtype} table"] = dense_case(width, dtype, table=True)
    for dtype in TYPES:
        cases[f"finish {dtype} table"] = finish_case(dtype, table=True)
    for dtype, bare in itertools.product(TYPES, (True, False)):
        cases[f"finish {dtype} {bare}"] = finish_case(dtype, bare=bare)
    for dtype, (name, block_format), columns in itertools.product(
        TYPES, FORMATS.items(), (4096, 4100)
    ):
        cases[f"rounding {name} {dtype} {columns}"] = rounding_case(block_format, dtype, columns)
    return cases | usual(architecture)
