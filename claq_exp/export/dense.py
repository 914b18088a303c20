"""Writes a packed checkpoint as an ordinary one, for programs that do not know packed weights."""

from __future__ import annotations

from pathlib import Path

from claq_exp.checkpoint.reader import load_model
from claq_exp.export.folder import copy_companions
from claq_exp.models.experts import fuse_experts
from claq_exp.sources.cache import published
from claq_exp.system.files import sync_folder
from claq_exp.tensor_files.shards import SHARD_BYTES


def write_dense(
    folder: Path,
    target: Path,
    *,
    dtype: str,
    trust_remote_code: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Dequantize a checkpoint into a plain Hugging Face folder, published by rename.

    Tokenizer, processors, chat templates and the like come along byte by byte.
    dtype: of all weights.  trust_remote_code: as in `load_model`.  Raises ConfigError when `folder`
    is no checkpoint, CheckpointError for a damaged one.
    """
    model = load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    fuse_experts(model)
    with published(target) as new:
        model.save_pretrained(new, max_shard_size=shard_bytes)
        for path in new.glob("*.safetensors"):
            path.chmod(0o644)  # as in `save_tensors`
        copy_companions(folder, new, "dense")
        sync_folder(new)
    sync_folder(target.parent)
