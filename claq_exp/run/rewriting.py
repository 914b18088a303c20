"""Has a transform rewrite a block, and keeps what changed."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from claq_exp.checkpoint.store import BlockStore
from claq_exp.models.blocks import BlockInputs
from claq_exp.models.stream import BlockedModel
from claq_exp.run.watcher import Watcher
from claq_exp.system.distributed import Ranks
from claq_exp.transform.folding import Transform

REWRITE = "transform"  # a stage of the store


@torch.no_grad()
def rewrite(
    model: BlockedModel,
    index: int,
    inputs: BlockInputs,
    transform: Transform,
    store: BlockStore,
    seconds: dict[str, float],
    watcher: Watcher,
    ranks: Ranks,
) -> None:
    """Rewrite a block in the overlay, unless an earlier try has."""
    if not transform.passes or ranks.tell(store.has(REWRITE, index)):
        return
    started, path, overlay = time.perf_counter(), f"{model.path}.{index}", model.overlay
    with model.block(index) as block:
        made = []
        for move in transform.run(block, inputs, ranks):
            norm = move.norm(block, overlay.rounded)
            made.append((move, norm, move.columns(block, norm)))
    dense: dict[str, Tensor] = {}
    for _, norm, factors in made:
        for name, value in norm.items():
            dense[f"{path}.{name}"] = overlay.change(f"{path}.{name}", value)
        for name, factor in factors.items():
            dense |= overlay.multiply(f"{path}.{name}", factor)
    row = {
        "block": index,
        "name": path,
        "norms": {
            move.fold.norm: {"least": float(move.scales.min()), "most": float(move.scales.max())}
            for move, _, _ in made
        },
    }
    store.add(REWRITE, index, dense=dense, report=[row])
    seconds["transform"] = time.perf_counter() - started
    watcher.event("transform", row)
