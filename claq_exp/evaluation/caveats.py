"""What a reader must know of a measured number: it is told, and refused by `strict=true`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from claq_exp.errors import ClaqError, ConfigError, NumericalError

if TYPE_CHECKING:
    from claq_exp.evaluation.zero_shot import TaskScore

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Caveat:
    """Something that makes a number worth less than it looks.

    kind: cut, without_score, unanswered, few_rows or not_finite.  dataset: task or corpus.  words:
    a sentence.  lossy: whether `strict=true` refuses it.  error: with which error.
    """

    kind: str
    dataset: str
    words: str
    lossy: bool = True
    error: type[ClaqError] = NumericalError


def task_caveats(name: str, row: Row) -> Iterator[Caveat]:
    """Yield what is to be said of a task.  row: its score, as in results.json."""
    asked = f"{row.get('requests', 0):,} requests"
    if cut := row.get("cut_requests"):
        words = (
            f"{name}: {cut:,} of {asked} were longer than the model's context and lost "
            f"{row['cut_tokens']:,} tokens from their beginning; fewer shots, other rows or a "
            "model with a longer context help"
        )
        yield Caveat("cut", name, words, error=ConfigError)
    if lost := row.get("without_score"):
        words = f"{name}: {lost:,} of {asked} have no score (NaN), and its metrics say little"
        yield Caveat("without_score", name, words)
    if unanswered := row.get("unanswered_rows"):
        words = (
            f"{name}: in {unanswered:,} of {row['rows']:,} rows the right answer is none of the "
            "choices; they count as wrong"
        )
        yield Caveat("unanswered", name, words, error=ConfigError)


def perplexity_caveats(name: str, row: Row) -> Iterator[Caveat]:
    """Yield what is to be said of a perplexity.  row: as in results.json, null for not finite."""
    if row["quantized"] is not None:
        return
    if row["original"] is None:
        words = f"the perplexity of {name} is not finite"
    else:
        words = (
            f"the perplexity of {name} is not finite, where the original's is {row['original']:.2f}"
        )
    yield Caveat("not_finite", name, words, lossy=row["original"] is not None)


def caveats(results: Mapping[str, Any]) -> list[Caveat]:
    """Return all that is to be said of the numbers of a results.json; older ones say less."""
    found: list[Caveat] = []
    for name, row in results.get("perplexity", {}).items():
        found += perplexity_caveats(name, row)
    for name, row in results.get("kl", {}).items():
        if row["mean"] is None and results["perplexity"][name]["quantized"] is not None:
            words = f"the KL divergence of {name} is not finite"
            found.append(Caveat("not_finite", name, words))
    for name, row in results.get("zero_shot", {}).items():
        found += task_caveats(name, row)
        asked = _rows_asked(results, name)
        if asked is not None and row["rows"] < asked:
            words = f"{name} has {row['rows']:,} rows, fewer than the {asked:,} that are asked for"
            found.append(Caveat("few_rows", name, words, lossy=False))
    return found


def _rows_asked(results: Mapping[str, Any], task: str) -> int | None:
    evaluation = results.get("evaluation") or results.get("config", {}).get("evaluation", {})
    rows: int | None = evaluation.get("zero_shot", {}).get(task, {}).get("rows")
    return rows


def tell_caveats(
    results: Mapping[str, Any], event: Callable[..., None], *, strict: bool
) -> list[Caveat]:
    """Return `caveats` after an event for each.  Raises as `refuse` where `strict`."""
    found = caveats(results)
    for caveat in found:
        event("caveat", kind=caveat.kind, dataset=caveat.dataset, words=caveat.words)
    if strict:
        refuse(found)
    return found


def refuse(found: Iterable[Caveat]) -> None:
    """Raise the error of the first caveat that `strict=true` does not take."""
    for caveat in found:
        if caveat.lossy:
            raise caveat.error(f"strict=true, and {caveat.words}")


def refuse_score(name: str, score: TaskScore) -> None:
    """Raise as `refuse` for what is to be said of a task's score."""
    refuse(task_caveats(name, asdict(score)))
