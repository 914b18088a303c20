"""Checkpoints of tiny models with every linear layer of their blocks quantized."""

from __future__ import annotations

from pathlib import Path

import torch

from claq_exp.checkpoint.writer import PackedWeight, write_checkpoint
from claq_exp.models.discover import LINEAR, linear_weight
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import OutlierOrder
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, quantize_weight
from claq_exp.quantize.reservation import OutlierOrder as ReservedOutliers
from claq_exp.quantize.solver import Nearest

RECIPE = Recipe(KMeans(), OutlierOrder(2.5), ReservedOutliers(0.02), Nearest())


def write(model, tokenizer, blocks: str, target: Path) -> Path:
    """Quantize every linear below `blocks` and write the checkpoint."""
    packed = {}
    for name, module in model.get_submodule(blocks).named_modules(prefix=blocks):
        if isinstance(module, LINEAR):
            weight = linear_weight(module)
            hessian = torch.eye(weight.shape[1], dtype=torch.float64)
            problem = LinearProblem(weight.detach().float().clone(), hessian)
            found = quantize_weight(
                problem, RECIPE.solver.prepare(Moments(hessian)), RECIPE
            ).quantized
            packed[name] = PackedWeight(found.layout(), found.pack())
    write_checkpoint(target, model, tokenizer, packed, torch.float16)
    return target
