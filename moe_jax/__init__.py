"""Sparse Mixture-of-Experts transformers in JAX: parallelism that is proven, routing that can be
seen.
"""

import time

__version__ = "0.1.0"

STARTED = time.monotonic()  # of the process, nearly: "first step after ..." counts imports too
