"""Gives memory back to the system that this process has freed and its allocator still holds."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache

from torch import Tensor

MADV_DONTNEED = 4


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
