"""In which dtype sums, scores and losses are computed (docs/precision.md)."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def wide_dtype(dtype: Any) -> np.dtype:
    """Returns the dtype to add up in: float32, or float64 for float64."""
    # Not jnp.promote_types, which refuses bfloat16 with float32 under strict promotion.
    dtype = jnp.dtype(dtype)
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)
