"""How this process returns memory to the system: not at all.

Every execution of a compiled program allocates its temporary arrays, hundreds of megabytes, and
frees them. glibc gives so much back to the system at once, which then clears every page anew at its
next use: a tenth of a training step, measured on two cores of an AMD EPYC. So that memory is kept.
"""

import ctypes
import os

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
# Whoever sets one of these has chosen for himself.
CHOICES = ("MALLOC_", "GLIBC_TUNABLES")


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
