"""Times our perplexity against a plain transformers loop, side by side on the same windows.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py model=llama2_7b evaluation=wikitext2 --windows 32

Arguments with = are a run's overrides; model and texts are fetched as for a run.  The plain loop is
the one that papers publish: a window at a time, logits shifted, one cross entropy over them.  Both
take turns; the printed perplexities must agree.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
from common import command_line, note, parse, run_words
from torch import Tensor, nn

from claq_exp.compose.experiment import compose_config
from claq_exp.evaluation.perplexity import Corpus, perplexity, windows_at_once
from claq_exp.evaluation.predict import in_memory
from claq_exp.models.load import forward_dtype, load_config, load_model, load_tokenizer
from claq_exp.run.inputs import corpus_windows, fetch
from claq_exp.system.machine import choose_device, device_name, settle


def main() -> None:
    """Print tokens per second, ratio and perplexities of each corpus."""
    parser = command_line(__doc__)
    parser.add_argument("overrides", nargs="*", help="GROUP.FIELD=VALUE ...")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parse(parser, windows=2, rounds=1)
    with run_words(arguments, evaluated=True) as words:
        measure(arguments, words)


def measure(arguments: argparse.Namespace, words: list[str]) -> None:
    """Measure the perplexities of a run's corpora in both ways."""
    config = compose_config(["evaluation=perplexity", *words])
    device = choose_device(config.device)
    settle(config.seed, config.threads)
    fetched = fetch(config)
    model_config = load_config(fetched.model)
    corpora = corpus_windows(config, load_tokenizer(fetched.model), model_config)
    dtype = forward_dtype(config.model.dtype, model_config, device)
    model = load_model(fetched.model, dtype=dtype, device=device)
    print(device_name(device))
    for name, corpus in corpora.items():
        short = replace(corpus, windows=corpus.windows[: arguments.windows])
        compare(arguments, name, model, short, config.evaluation.batch_size, device)


def compare(
    arguments: argparse.Namespace,
    name: str,
    model: nn.Module,
    corpus: Corpus,
    batch_size: int | str,
    device: str,
) -> None:
    """Run both in turn and print what they gave."""
    seqlen = corpus.windows.shape[1]
    at_once = windows_at_once(batch_size, seqlen, model.config.vocab_size, device)
    ours, plain = [], []
    for _ in range(arguments.rounds + 1):
        started = time.perf_counter()
        value = perplexity(in_memory(model, device), corpus, at_once).value
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        expected = plain_loop(model, corpus.windows, device)
        plain.append(time.perf_counter() - started)
    ratios = [theirs / our for our, theirs in zip(ours[1:], plain[1:], strict=True)]
    speed = corpus.windows.numel() / statistics.median(ours[1:])
    print(
        f"{name}: {len(corpus.windows)} windows of {seqlen}, {at_once} at a time: "
        f"{speed:,.0f} tokens/s, {statistics.median(ratios):.2f} x the plain loop "
        f"({min(ratios):.2f} to {max(ratios):.2f}); "
        f"perplexity {value:.4f}, plain loop {expected:.4f}"
    )
    ratio = statistics.median(ratios)
    note(
        arguments,
        corpus=name,
        tokens_per_s=speed,
        ratio=ratio,
        perplexity=value,
        plain_perplexity=expected,
    )


@torch.no_grad()
def plain_loop(model: nn.Module, windows: Tensor, device: str) -> float:
    """Return the perplexity as the published evaluation scripts compute it."""
    losses = []
    for window in windows:
        batch = window[None].to(device)
        logits = model(batch).logits
        shifted = logits[:, :-1, :].contiguous()
        loss = nn.CrossEntropyLoss()(shifted.view(-1, shifted.size(-1)), batch[:, 1:].reshape(-1))
        losses.append(loss.float() * batch.shape[1])
    return torch.exp(torch.stack(losses).sum() / windows.numel()).item()


if __name__ == "__main__":
    main()
