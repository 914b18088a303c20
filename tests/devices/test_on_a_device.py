"""The parts of a run on a device that is not the CPU, beside the same parts on the CPU.

Nothing here may hang on a rounding: what is compared takes the same inputs and one step.
"""

from __future__ import annotations

from pathlib import Path

import pretend_device
import pytest
import torch
from packed_models import packed_model
