"""The windows of two runs side by side: how sure a difference of perplexity or KL is."""

from __future__ import annotations

from claq_exp.reporting.cells import NOT_FINITE
from claq_exp.reporting.collect import Run
from claq_exp.reporting.columns import same_content
from claq_exp.reporting.intervals import (
    LEAST_WINDOWS,
    Interval,
    kl_interval,
    perplexity_interval,
)
from claq_exp.run_folder.windows import Windows

OLDER = "a run has no windows.csv that can be read; older runs have none"
FEW = f"fewer than {LEAST_WINDOWS} windows (evaluation.kl_windows, windows of the corpus)"
OTHER = "measured on different content"
INTERVALS = {"perplexity": perplexity_interval, "kl": kl_interval}


def window_interval(one: Run, two: Run, key: str) -> Interval | str:
    """Return the interval of a measure of two runs over their windows, or why there is none.

    key: of a perplexity or KL.
    """
    kind, _, corpus = key.partition(".")
    windows = one.windows.get(corpus), two.windows.get(corpus)
    before, after = windows
    measures = one.measures[key], two.measures[key]
    if not same_content(*(measure.content for measure in measures)):
        return OTHER
    if before is None or after is None:
        return OLDER
    if not _same_windows(before, after, kind):
        return OTHER
    if any(measure.quantized is None for measure in measures):
        return NOT_FINITE
    if len(before.kl if kind == "kl" else before.nll) < LEAST_WINDOWS:
        return FEW
    return INTERVALS[kind](before, after) or f"{NOT_FINITE}, or zero"


def _same_windows(before: Windows, after: Windows, kind: str) -> bool:
    if kind == "kl" and len(before.kl) != len(after.kl):
        return False
    return (before.contents, before.tokens) == (after.contents, after.tokens)
