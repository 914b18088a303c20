"""Kernels run on the GPU where there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run; tests/conftest.py turns the interpreter on."""
    return "cuda" if torch.cuda.is_available() else "cpu"
