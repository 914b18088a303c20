"""KL divergence of a quantized model's predictions from the original model's."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from claq_exp.errors import CheckpointError
from claq_exp.system.files import sync_folder

CHUNK = 32  # tokens at a time: float64 copies of them are small beside a window's logits


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from the original's.

    mean: of KL(p_original || p_quantized) over the predicted tokens, in nats.  top1_agreement:
    share of them for which both models hold the same token most likely.  tokens: their number.
    window_kl: the sum of a window's KL, for each window: `mean` is their sum (`math.fsum`) over
    `tokens`.
    """

    mean: float
    top1_agreement: float
    tokens: int
    window_kl: tuple[float, ...] = ()


def rounded(logits: Tensor) -> Tensor:
    """Return logits [tokens, vocabulary] minus their row maximum, in float16.

    A softmax does not see the shift, and the shifted values z <= 0 are finest where it matters, at
    the top: the most likely token stays so unless another is within 2^-25 of it.  Softmax of the
    rounded values is a distribution again, so that the KL from it is never negative.  Each z is
    off by at most 2^-11 |z| (2^-25 below 2^-14), which gives
        KL(rounded || exact) <= 2^-23 E[z^2]              about 1e-6 nats; below 1.5e-5 nats for
                                                          any logits over 2^18 tokens or fewer
        |KL(rounded || q) - KL(exact || q)| <= the same + 2^-11 sqrt(E[z^2]) sd(log p/q)
    to first order in 2^-11 max |z|.  The second bound needs every rounding to err the same way;
    over many tokens the errors average out.
    """
    scores = logits.float()
    return (scores - scores.amax(-1, keepdim=True)).half()


def divergences(original: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compare predictions, both [tokens, vocabulary]: logits up to a shift of each row.

    Returns KL(softmax(original) || softmax(logits)) in nats, [tokens] float64, and whether the most
    likely token is the same, [tokens] bool (the first of equals).  KL is infinite where a token has
    probability 0 in `logits` alone, NaN (and no agreement) where there are NaN logits.
    """
    log_p = original.double().log_softmax(-1)
    log_q = logits.double().log_softmax(-1)
    p = log_p.exp()
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))  # p == 0 is False for NaN
    kl = terms.sum(-1)
    return kl, (original.argmax(-1) == logits.argmax(-1)) & ~kl.isnan()


class LogitStore:
    """The original's rounded logits on the first windows of each corpus: one .npy file a corpus.

    A file holds float16 [windows, seqlen - 1, vocabulary].  It gets its name when all of it is on
    disk, so that a file that is there is whole.  windows: corpus -> how many (0: none).
    """

    def __init__(self, folder: Path, windows: dict[str, int]) -> None:
        self.windows = {name: count for name, count in windows.items() if count > 0}
        self._paths = {
            name: folder / f"original_logits_{number}.npy"  # a corpus' name may fit no file
            for number, name in enumerate(sorted(windows))
        }

    def complete(self) -> bool:
        """Tell whether every wanted window is there."""
        try:
            return all(len(self._open(name)) == count for name, count in self.windows.items())
        except CheckpointError:
            return False

    def record(self, corpus: str, window: int, logits: Tensor) -> None:
        """Keep logits [seqlen - 1, vocabulary] of a window; those of a corpus come in order.

        Raises CheckpointError when the disk does not take them.
        """
        count = self.windows.get(corpus, 0)
        if window >= count:
            return
        path = self._paths[corpus]
        unfinished = path.with_name(f".{path.name}")
        try:
            with unfinished.open("ab" if window else "wb") as file:
                if window == 0:
                    path.unlink(missing_ok=True)
                    facts = {
                        "descr": "<f2",
                        "fortran_order": False,
                        "shape": (count, *logits.shape),
                    }
                    np.lib.format.write_array_header_1_0(file, facts)
                for chunk in logits.split(CHUNK):
                    file.write(rounded(chunk).cpu().numpy().tobytes())
                file.flush()
                if window == count - 1:
                    os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{unfinished} cannot be written: {error.strerror}") from error
        if window == count - 1:
            unfinished.replace(path)
            sync_folder(path.parent)

    def read(self, corpus: str, window: int) -> Tensor:
        """Return what was recorded of a window, [seqlen - 1, vocabulary] float16.

        Raises CheckpointError when the file is missing or cut short.
        """
        return torch.from_numpy(np.array(self._open(corpus)[window]))

    def _open(self, corpus: str) -> np.ndarray:
        path = self._paths[corpus]
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error


class Comparison:
    """Sums up divergences from a store, window by window."""

    def __init__(self, store: LogitStore) -> None:
        self._store = store
        self._kl: dict[str, list[Tensor]] = {}
        self._agreement: dict[str, list[Tensor]] = {}

    def add(self, corpus: str, window: int, logits: Tensor) -> None:
        """Compare logits [seqlen - 1, vocabulary] of a window with the original's, if it is wanted.

        Raises CheckpointError when the original's are missing or cut short.
        """
        if window >= self._store.windows.get(corpus, 0):
            return
        original = self._store.read(corpus, window).split(CHUNK)
        compared = [
            divergences(before.to(after.device), after)
            for before, after in zip(original, logits.split(CHUNK), strict=True)
        ]
        kl, agreement = (torch.cat(parts).cpu() for parts in zip(*compared, strict=True))
        self._kl.setdefault(corpus, []).append(kl)
        self._agreement.setdefault(corpus, []).append(agreement)

    def results(self) -> dict[str, Divergence]:
        """Return corpus -> divergence over all windows that were added."""
        found = {}
        for corpus, parts in self._kl.items():
            sums = tuple(kl.sum().item() for kl in parts)
            agreement = torch.cat(self._agreement[corpus])
            tokens, same = len(agreement), agreement.double().mean().item()
            found[corpus] = Divergence(math.fsum(sums) / tokens, same, tokens, sums)
        return found
