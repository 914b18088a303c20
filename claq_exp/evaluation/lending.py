"""What other libraries get of ours, and what they leave of the process that they ran in."""

from __future__ import annotations

import copy
import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PYTHON_SEED, SEED = 0, 1234  # as lm-eval's own command line seeds Python, and numpy and torch


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Give back what others change of a process.

    Random numbers, environment, log levels, filters of warnings, and torch's settings.  Without
    this, what comes later would depend on whether a score was measured or found.
    """
    with ExitStack() as stack:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(warnings.catch_warnings())
        for keep in (_keep_random_numbers, _keep_environment, _keep_log_levels, _keep_torch):
            stack.callback(keep())
        yield


def seed_like_lm_eval() -> None:
    """Seed all random numbers, so that an answer that is drawn is the same in every run."""
    random.seed(PYTHON_SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@contextmanager
def lent(model: PreTrainedModel) -> Iterator[None]:
    """Let others have a model with copies of its settings; it has its own again afterwards."""
    config, generation, training = model.config, model.generation_config, model.training
    model.config, model.generation_config = copy.deepcopy(config), copy.deepcopy(generation)
    try:
        yield
    finally:
        model.config, model.generation_config = config, generation
        model.train(training)


def _keep_random_numbers() -> Any:
    python, numpy = random.getstate(), np.random.get_state()

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)

    return restore


def _keep_environment() -> Any:
    before = dict(os.environ)

    def restore() -> None:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value

    return restore


def _keep_log_levels() -> Any:
    loggers = [logging.root, *map(logging.getLogger, ("lm_eval", "transformers", "datasets"))]
    levels, handlers = [logger.level for logger in loggers], list(logging.root.handlers)

    def restore() -> None:
        logging.root.handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

    return restore


def _keep_torch() -> Any:
    settings: list[tuple[Any, Any]] = [
        (torch.set_default_dtype, torch.get_default_dtype()),
        (torch.set_num_threads, torch.get_num_threads()),
        (torch.set_grad_enabled, torch.is_grad_enabled()),
        (torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()),
        (torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode()),
    ]
    cudnn = torch.backends.cudnn
    flags = {name: getattr(cudnn, name) for name in ("benchmark", "deterministic", "allow_tf32")}

    def restore() -> None:
        for restore_one, value in settings:
            restore_one(value)
        for name, value in flags.items():
            setattr(cudnn, name, value)

    return restore
