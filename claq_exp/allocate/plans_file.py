"""Keeps what was decided of a whole model, for the same command to go on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from claq_exp.errors import CheckpointError
from claq_exp.quantize.allocation import ColumnPlan, MatrixPlan
from claq_exp.quantize.codebook import CODEBOOK
from claq_exp.quantize.strategy import find_strategy, strategy_name
from claq_exp.system.files import write_bytes


def save_plans(path: Path, plans: Mapping[str, MatrixPlan]) -> None:
    """Write the plans of a model's matrices to one file, replacing it whole.

    A codebook is stored by its name, as in a config, and its fields.
    """
    tensors, described = {}, {}
    for name, plan in plans.items():
        described[name] = {
            "codebook": strategy_name(CODEBOOK, plan.codebook),
            "fields": asdict(plan.codebook),  # type: ignore[call-overload]
            "select": plan.columns.select,
        }
        tensors[f"{name}.column_bits"] = plan.columns.column_bits
        tensors[f"{name}.reserved_counts"] = plan.columns.reserved_counts
        if plan.row_weights is not None:
            tensors[f"{name}.row_weights"] = plan.row_weights
    write_bytes(path, save(tensors, {"plans": json.dumps(described)}))


def load_plans(path: Path) -> dict[str, MatrixPlan]:
    """Read `save_plans` back.  Raises CheckpointError when the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            described = json.loads(file.metadata()["plans"])
            tensors: dict[str, torch.Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return {
            name: MatrixPlan(
                find_strategy("codebook", CODEBOOK, plan["codebook"])(**plan["fields"]),
                ColumnPlan(
                    tensors[f"{name}.column_bits"],
                    tensors[f"{name}.reserved_counts"],
                    plan["select"],
                ),
                tensors.get(f"{name}.row_weights"),
            )
            for name, plan in described.items()
        }
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; set resume=never to start over"
        ) from error
