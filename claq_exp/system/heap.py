"""Gives memory back to the system that this process has freed and its allocator still holds."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache

from torch import Tensor

MADV_DONTNEED = 4
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
PIECE = 1 << 20  # bytes from which a tensor has pages of its own


def return_at_once() -> None:
    """Have freed tensors go back to the system at once, where the C library can (glibc).

    By default it keeps what it expects to give out again, up to 32 MiB a piece and for each thread.
    """
    library = _c_library()
    if library is not None and hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, PIECE)
        library.mallopt(M_TRIM_THRESHOLD, PIECE)


def trim() -> None:
    """Give back what is freed, where the C library can (glibc)."""
    library = _c_library()
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def forget(tensor: Tensor) -> None:
    """Give back the pages of a contiguous CPU tensor whose content is not needed any more.

    It may be written again; until then its content is arbitrary.
    """
    library = _c_library()
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if library is not None and end > start:
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


@cache
def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
