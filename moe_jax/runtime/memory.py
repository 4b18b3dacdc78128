"""How this process returns memory to the system (not at all), and how often it looks for garbage.

Every execution of a compiled program allocates its temporary arrays, hundreds of megabytes, and
frees them. glibc gives so much back to the system at once, which then clears every page anew at its
next use: a tenth of a training step, measured on two cores of an AMD EPYC. So that memory is kept.
"""

import ctypes
import gc
import os

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
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
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # One heap for all threads, from which no piece is mapped on its own, and whose end stays.
    options = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    return all(mallopt(option, value) for option, value in options)


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
