"""How this process has its memory of the system, and how often it looks for garbage.

Every execution of a compiled program allocates its temporary arrays, hundreds of megabytes, and
frees them. glibc gives so much back to the system at once, which then clears every page anew at its
next use: a tenth of a training step, measured on two cores of an AMD EPYC. So that memory is kept.
Where the system asks to be told so (Linux: transparent_hugepage = madvise), it is also told that
the heap may have pages of 2 MB, which saves some hundredths of a step (docs/speed.md).
"""

import ctypes
import gc
import mmap
import os
from pathlib import Path

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
# Bytes of a huge page.
_HUGE = 2**21
# Whoever sets one of these has chosen for himself.
CHOICES = ("MALLOC_", "GLIBC_TUNABLES")
# Objects that are made between two looks for cycles that nobody can reach, and how many young looks
# come before an old one. Imports and tracing make millions of objects that stay.
AT_THE_START = (50_000, 20, 20)


def keep() -> bool:
    """Has freed memory kept for the next allocation; returns whether it is.

    To be called before there are threads. Elsewhere than in glibc it does nothing.
    """
    if any(name.startswith(CHOICES) for name in os.environ):
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (AttributeError, OSError):
        return False
    # One heap for all threads, from which no piece is mapped on its own, and whose end stays.
    options = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    kept = all(mallopt(option, value) for option, value in options)
    if kept:
        _allow_huge_pages(libc)
    return kept


def _allow_huge_pages(libc: ctypes.CDLL) -> None:
    """Tells the system that the heap may have huge pages, as far as it may grow.

    The heap is grown by half of the memory of the machine and told of, but not touched: that takes
    addresses and no memory. Where addresses are counted as memory, nothing is done.
    """
    try:
        counts_addresses = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return
    if counts_addresses:
        return
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    grown = libc.malloc(size)
    # A limit of the user's may be smaller.
    if grown is None:
        return
    start = -(-grown // _HUGE) * _HUGE
    libc.madvise(start, grown + size - start, mmap.MADV_HUGEPAGE)
    # It stays a part of the heap, whose end is never given back.
    libc.free(grown)


def collect_rarely() -> None:
    """Has Python look for unreachable cycles of objects rarely.

    For a start alone. In a long run a cycle that is found late may hold arrays of a device.
    """
    _before[:] = gc.get_threshold()
    gc.set_threshold(*AT_THE_START)


def collect_as_usual() -> None:
    """Ends what `collect_rarely` began, if it was called."""
    if _before:
        gc.set_threshold(*_before)


# What `collect_rarely` has replaced.
_before: list[int] = []
