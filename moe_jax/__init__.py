"""Sparse Mixture-of-Experts transformers in JAX: parallelism that is proven, routing that can be seen."""

import os
import time

STARTED = time.monotonic()  # of the process, nearly: "first step after ..." counts imports too
# Read when jax loads, hence here: simulated devices need more threads than two cores give, or their collectives deadlock.
os.environ.setdefault("PJRT_NPROC", "64")
