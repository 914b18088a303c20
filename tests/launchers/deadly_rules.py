"""A rule for column widths that does to its process what jobs must survive of each other."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import torch

from claq_exp.quantize.precision import Precision
from claq_exp.quantize.statistics import EqualColumns

ACTED: list[str] = []  # once in a process, at its first layer


@dataclasses.dataclass(frozen=True)
class Rule(Precision):
    """how: what happens when columns get widths.  place: folder for marks.  once: only at first."""

    how: str = "nothing"
    place: str = ""
    once: bool = False

    def plan(self, statistics):
        mark = Path(self.place, self.how)
        planned = isinstance(statistics, EqualColumns)  # no layer yet: a check before the run
        if not planned and not ACTED and not (self.once and mark.exists()):
            ACTED.append(self.how)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(str(os.getpid()))
            getattr(self, f"_{self.how}")()
        return torch.full((statistics.shape[1],), 3, dtype=torch.uint8)

    def _nothing(self):
        pass

    def _kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def _abort(self):
        os.abort()

    def _leave(self):
        os._exit(7)

    def _fail(self):
        raise RuntimeError("no such luck\nat all")

    def _stop(self):
        raise KeyboardInterrupt

    def _sleep(self):
        for _ in range(600):
            time.sleep(0.01)

    def _spoil(self):
        """Change all that a process shares, as late as possible."""
        random.seed(99)
        np.random.seed(99)
        torch.manual_seed(99)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.set_float32_matmul_precision("medium")
        os.environ["SPOILED"] = "1"
        torch.set_num_threads(2)
        torch.ones(700 << 18)  # 700 MiB

    def _look(self):
        """Write down what a job sees of its process."""
        seen = {
            "random": random.random(),
            "numpy": float(np.random.random()),
            "torch": torch.rand(()).item(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "precision": torch.get_float32_matmul_precision(),
            "spoiled": os.environ.get("SPOILED"),
            "threads": torch.get_num_threads(),
            "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }
        Path(self.place, "seen.json").write_text(json.dumps(seen))
