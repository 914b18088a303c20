"""How jobs get processes of their own: from a server that has imported all and run nothing."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext

IMPORTED = ["claq_exp.sweep.apart", "lm_eval.tasks", "datasets"]


def process_maker() -> ForkServerContext | SpawnContext:
    """Return what makes processes; they inherit no CUDA context, threads or settings."""
    if multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("spawn", force=True)  # joblib's own, which no child knows
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def start_server() -> None:
    """Let the server import beside this process, which has its own imports before it."""
    if isinstance(process_maker(), ForkServerContext):
        forkserver.ensure_running()
