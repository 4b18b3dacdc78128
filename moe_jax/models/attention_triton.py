"""The flash attention that JAX has for GPUs, written in Pallas for Triton, where it can say which
keys are seen.

It knows causality and segments: not a window, a cap, a prefix, nor attention across rows. Scores
stay in the fast memory of a core. What it keeps for the backward pass has no name, so a block that
is computed again computes it again (model.remat). Its kernels do not tell over which mesh axes a
result varies, so a `shard_map` around it must not check that (models/attention.py).

Off a GPU it is interpreted, which is slow and for tests.

Shapes: see attention_core.py.
"""

import functools
import warnings
from typing import Any

import jax.numpy as jnp
from jax import Array

from moe_jax.models.attention_layout import Reach, Scores
from moe_jax.parallel.compiling import by_platform

# Tokens of its largest block, which must divide a row.
BLOCK = 128


def can_say(q_BTHA: Array, segment_BT: Any, scores: Scores, reach: Reach) -> bool:
    """Returns whether it takes such queries, with what is masked beside segments known."""
    is_masked = isinstance(segment_BT, Array) and reach.window is None and not scores.cap
    # Triton multiplies no float64.
    return is_masked and q_BTHA.shape[1] % BLOCK == 0 and q_BTHA.dtype.itemsize <= 4


def attention(
    q_BTHA: Array,
    k_BTGA: Array,
    v_BTGA: Array,
    segment_BT: Array,
    scores: Scores,
    reach: Reach,
) -> Array:
    """Returns o_BTHA: every query attends within its segment; padding (0) gives zero."""
    with warnings.catch_warnings():
        # jax 0.12 warns that tokamax is to take its place, about which a user can do nothing here.
        warnings.simplefilter("ignore", DeprecationWarning)
        # Imported here: Pallas is a part of a second of every start, and few runs use it.
        from jax.experimental.pallas.ops.gpu import attention as kernels

    def run(interpret: bool, *args: Array) -> Array:
        how = {"sm_scale": scores.scale, "causal": reach.causal, "interpret": interpret}
        return kernels.mha(*args, **how)

    # It has as many heads of keys as of queries.
    queries_of_key = q_BTHA.shape[2] // k_BTGA.shape[2]
    k_BTHA, v_BTHA = (jnp.repeat(z, queries_of_key, axis=2) for z in (k_BTGA, v_BTGA))
    interpreted = functools.partial(run, True)
    o_BTHA = by_platform(
        q_BTHA,
        k_BTHA,
        v_BTHA,
        segment_BT,
        cpu=interpreted,
        tpu=interpreted,
        others=functools.partial(run, False),
    )
    # To the kernel padding is a segment like others.
    return jnp.where((segment_BT > 0)[:, :, None, None], o_BTHA, 0)
