"""Which model a checkpoint was quantized from, as the folder of its run says."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields
from pathlib import Path

from claq_exp.config import ModelConfig
from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.run_folder import settings_file
from claq_exp.system.files import read_json


@dataclass(frozen=True)
class Origin:
    """Where a model came from, and the hash of its files then (`fingerprint`)."""

    model: ModelConfig
    content: str


def recorded_origin(checkpoint: Path) -> Origin | None:
    """Return what the folder around a checkpoint says of its original; None where it says nothing.

    Code that comes with a model is never allowed by such a record.
    """
    known = {field.name for field in fields(ModelConfig)} - {"trust_remote_code"}
    with contextlib.suppress(CheckpointError, ConfigError, KeyError, TypeError, AttributeError):
        written = read_json(settings_file(checkpoint.resolve().parent))
        model = written["config"]["model"].items()
        content = written["contents"]["model"]
        return Origin(ModelConfig(**{k: v for k, v in model if k in known}), str(content))
    return None
