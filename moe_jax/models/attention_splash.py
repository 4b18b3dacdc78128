"""Splash attention, the flash attention of JAX for TPUs, where it can say which keys are seen.

It knows causality, a window and segments: not a prefix, nor attention across rows. Scores stay in
the fast memory of the core. Its kernels do not tell over which mesh axes a result varies, so a
`shard_map` around it must not check that (models/attention.py).

Off a TPU it is interpreted, which is slow and for tests.

Shapes: see attention_core.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.models.attention_layout import SAVED, Reach, Scores
from moe_jax.parallel.compiling import by_platform

# Tokens of a block, of which the largest that divides a row is taken; the lanes of a TPU.
BLOCKS = (512, 256, 128)


def can_say(q_BTHA: Array, segment_BT: Any, scores: Scores, reach: Reach) -> bool:
    """Returns whether it takes such queries, with what is masked beside segments known."""
    del scores, reach  # it knows caps and windows
    return isinstance(segment_BT, Array) and q_BTHA.shape[1] % BLOCKS[-1] == 0


def attention(
    q_BTHA: Array,
    k_BTGA: Array,
    v_BTGA: Array,
    segment_BT: Array,
    scores: Scores,
    reach: Reach,
) -> Array:
    """Returns o_BTHA: every query attends within its segment; padding (0) gives zero."""
    # Imported here: it is a tenth of a second of every start, and few runs use it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    T, H = q_BTHA.shape[1:3]
    mask: Any = masks.FullMask((T, T))
    if reach.causal:
        mask = masks.CausalMask((T, T))
    if reach.window is not None:
        # Itself, and so many tokens before it; none after it.
        mask = masks.LocalMask((T, T), (reach.window - 1, 0), 0)
    block = next(size for size in BLOCKS if T % size == 0)
    # Forward, and the two products of the backward pass: dk and dv, and dq.
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def run(interpret: bool, *args: Array) -> Array:
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * H),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=sizes,
            attn_logits_soft_cap=scores.cap or None,
            residual_checkpoint_name=SAVED,
            interpret=interpret,
        )

        def of_row(q_HTA: Array, k_GTA: Array, v_GTA: Array, segment_T: Array) -> Any:
            return kernel(q_HTA, k_GTA, v_GTA, kernels.SegmentIds(segment_T, segment_T))

        return jax.vmap(of_row)(*args)

    # The kernel knows no scale, so it goes into the queries.
    q_BTHA = (q_BTHA * scores.scale).astype(q_BTHA.dtype)
    q_BHTA, k_BGTA, v_BGTA = (jnp.swapaxes(z, 1, 2) for z in (q_BTHA, k_BTGA, v_BTGA))
    o_BHTA = by_platform(
        q_BHTA,
        k_BGTA,
        v_BGTA,
        segment_BT,
        tpu=functools.partial(run, False),
        others=functools.partial(run, True),
    )
    o_BTHA = jnp.swapaxes(o_BHTA, 1, 2).astype(q_BTHA.dtype)
    # To the kernel padding is a segment like others.
    return jnp.where((segment_BT > 0)[:, :, None, None], o_BTHA, 0)
