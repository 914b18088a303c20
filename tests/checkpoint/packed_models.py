"""A tiny model with quantized blocks, its checkpoint, and ways to tamper with one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from claq_exp.checkpoint.writer import PackedWeight, write_checkpoint
from claq_exp.models.load import load_model as load_original
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import OutlierOrder
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, quantize_weight
from claq_exp.quantize.reservation import OutlierOrder as ReservedOutliers
from claq_exp.quantize.solver import Nearest
from claq_exp.system.files import read_json, write_json

RECIPE = Recipe(KMeans(), OutlierOrder(2.5), ReservedOutliers(0.02), Nearest())
SHARED = replace(RECIPE, codebook=KMeans(shared=True, row_scales=True))
SOME_LINEAR = "model.layers.1.self_attn.q_proj"
SHARED_LINEAR = "model.layers.1.mlp.up_proj"


class Written:
    """A model with quantized decoder blocks, and what its checkpoint was written from."""

    def __init__(self, source: Path) -> None:
        self.model = load_original(source, dtype="float32", device="cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.quantized = {}
        for name, module in self.model.model.layers.named_modules(prefix="model.layers"):
            if isinstance(module, nn.Linear):
                hessian = torch.eye(module.in_features, dtype=torch.float64)
                problem = LinearProblem(module.weight.detach(), hessian)
                recipe = SHARED if "mlp" in name else RECIPE
                system = recipe.solver.prepare(Moments(hessian))
                self.quantized[name] = quantize_weight(problem, system, recipe).quantized
                module.weight.data.copy_(self.quantized[name].dequantize())
        self.packed = {
            name: PackedWeight(weight.layout(), weight.pack())
            for name, weight in self.quantized.items()
        }

    def write(self, target: Path, **options: int) -> Path:
        """Write the checkpoint.  options: of `write_checkpoint`."""
        write_checkpoint(target, self.model, self.tokenizer, self.packed, torch.float16, **options)
        return target


def change_json(path: Path, change: Callable[[dict], None]) -> None:
    data = read_json(path)
    change(data)
    write_json(path, data)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
