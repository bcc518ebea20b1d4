"""How freed memory goes back to the system, where the C library is glibc; with another one nothing is done."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# Of malloc.h: sizes from which a block is returned as soon as it is freed, and of free memory at the end of the heap.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_SOON = 2**20
# What glibc's own adjusting comes to in a process that frees large blocks.
_LATER = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
_VARIABLES = {_MMAP_THRESHOLD: "MALLOC_MMAP_THRESHOLD_", _TRIM_THRESHOLD: "MALLOC_TRIM_THRESHOLD_"}


@contextmanager
def returned_soon() -> Iterator[None]:
    """Return every freed block of a MiB or more at once, for a block of code that needs much memory.

    By default blocks of up to 32 MiB are kept for reuse, which saves time. But what stays lies between what went: of
    large blocks of many sizes twice as much is held as is in use.
    """
    library = _glibc()
    if library is None:
        yield
        return
    for parameter in _LATER:
        library.mallopt(parameter, _SOON)
    library.malloc_trim(0)
    try:
        yield
    finally:
        for parameter, usual in _LATER.items():
            library.mallopt(parameter, int(os.environ.get(_VARIABLES[parameter], usual)))


@cache
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "gnu_get_libc_version") else None
