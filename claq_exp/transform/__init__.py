"""Rewrites of a model that computes the same and is quantized better."""

from __future__ import annotations

from claq_exp.transform.folding import NoTransform
from claq_exp.transform.smooth import Smooth

TRANSFORM: dict[str, type] = {"none": NoTransform, "smooth": Smooth}
