"""Times a model whose activations are rounded against the same model as it is.

    python benchmarks/rounded_forward.py activation=lo_bcq

Side by side in one process, windows in turn.  Nothing else changes: weights are those of the
model.  Prints the ratio and what rounding takes for each token; the target is twice the plain
forward on a CPU, and 1.3 times on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from common import command_line, note, parse, run_words

from claq_exp.compose.experiment import compose_config
from claq_exp.models.activations import round_inputs
from claq_exp.models.discover import linears_of
from claq_exp.models.load import forward_dtype, load_config, open_model
from claq_exp.quantize.activation.rounding import settle_rounding
from claq_exp.run.inputs import fetch, tokenize_inputs
from claq_exp.sources.cache import cache_folder
from claq_exp.system.machine import choose_device, device_name

TARGETS = {"cpu": 2.0, "cuda": 1.3}


def main() -> int:
    """Print the table; return 1 where the target is missed."""
    parser = command_line(__doc__)
    parser.add_argument("--windows", type=int, default=4, help="of calibration.seqlen tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="GROUP.FIELD=VALUE of claq-exp")
    arguments = parse(parser, windows=2, rounds=1)
    with run_words(arguments) as words:
        return measure(arguments, words)


def measure(arguments: argparse.Namespace, words: list[str]) -> int:
    """Time both passes; return 1 where the target is missed, which a miniature cannot."""
    windows = f"calibration.windows={arguments.windows}"
    config = compose_config([*words, windows, "evaluation=none"])
    rounding = settle_rounding(config.activation_rule(), None)
    if rounding is None:
        raise SystemExit("activation=none rounds nothing; add activation=lo_bcq, say")
    device = choose_device(config.device)
    fetched = fetch(config)
    batch = tokenize_inputs(config, fetched.model, fetched.contents).calibration.to(device)
    dtype = forward_dtype(config.model.dtype, load_config(fetched.model), device)

    def load(*, rounded: bool) -> Callable[[], float]:
        converted = cache_folder() / "converted"
        opened = open_model(fetched.model, converted, dtype=dtype, device=device)
        model = opened.load()
        names = [
            f"{opened.path}.{index}.{name}"
            for index, block in enumerate(opened.blocks)
            for name in linears_of(block)
        ]
        if rounded:
            round_inputs(model, rounding, names)

        @torch.inference_mode()
        def seconds() -> float:
            started = time.perf_counter()
            model(batch, use_cache=False)
            if batch.is_cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - started

        seconds()
        return seconds

    passes = [load(rounded=False), load(rounded=True)]
    taken = [[run() for run in passes] for _ in range(arguments.rounds)]
    plain, rounded = (statistics.median(row[place] for row in taken) for place in (0, 1))
    ratio, tokens = rounded / plain, batch.numel()
    print(f"{device_name(device)}, {tokens} tokens, {config.activation}")
    print(f"plain forward      {1e6 * plain / tokens:10.1f} us a token")
    print(f"rounded forward    {1e6 * rounded / tokens:10.1f} us a token")
    print(f"rounding           {1e6 * (rounded - plain) / tokens:10.1f} us a token")
    print(f"ratio              {ratio:10.2f}, target {TARGETS[device.partition(':')[0]]}")
    note(
        arguments,
        activation=config.activation["name"],
        tokens=tokens,
        plain_s=plain,
        rounded_s=rounded,
        ratio=ratio,
    )
    return int(ratio > TARGETS[device.partition(":")[0]] and not arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
