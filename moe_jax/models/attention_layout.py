"""How the kernels of attention see their arrays: heads first, and the bounds of every query.

Shapes: see attention_core.py.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from moe_jax.models.soft_cap import pulled_back, soft_cap
from moe_jax.precision import wide_dtype

# The name of what the backward pass reads of attention (models/stack.py).
SAVED = "attention"
# A score, far below every real one and far from overflow.
MASKED = -1e30


class Reach(NamedTuple):
    """Holds which keys queries may see at most, as far as it is known before it is compiled."""

    # A query sees its own place and none after it.
    causal: bool
    # How many keys any query sees; None = the whole row.
    window: int | None = None
    # Devices of the axis `seq`, of which this one has its own queries of each row
    # (parallel/context.py), and the keys of whole rows.
    shards: int = 1


class Scores(NamedTuple):
    """Holds what becomes of the product of a query and a key: times `scale`, then under a soft
    cap (soft_cap.py); cap = 0: no cap.
    """

    scale: float
    cap: float = 0.0
    # attention_bias.Buckets, by which a number of each head is added after that; None = none is.
    buckets: Any = None

    def of(self, product: Array) -> Array:
        return soft_cap(product * self.scale, self.cap)

    def pulled(self, dscore: Array, score: Array) -> Array:
        """Returns the gradient of the product times scale, from that of the score."""
        return pulled_back(dscore, score, self.cap)


def shift(o: Array, do: Array, dlog_sum: Array | None) -> Array:
    """Returns what the softmax's gradient takes off the gradients of its weights, of outputs and
    their cotangents [..., V], and of the log of the denominator.
    """
    wide = wide_dtype(o.dtype)
    shift = jnp.sum(o.astype(wide) * do.astype(wide), axis=-1)
    # The log of the denominator has the weights as its gradient.
    return shift if dlog_sum is None else shift - dlog_sum


def heads_first(z_BTHA: Array, G: int) -> Array:
    """Returns [N, T * r, A]: the r queries of a token that share a key head stand side by side."""
    B, T, _, A = z_BTHA.shape
    z_BTGrA = z_BTHA.reshape(B, T, G, -1)
    return jnp.swapaxes(z_BTGrA, 1, 2).reshape(B * G, -1, A)


def heads_last(z_NQA: Array, shape: tuple[int, ...], G: int) -> Array:
    """Returns the array of `shape`, [B, T, H, A], that `heads_first` came from."""
    B, T, _, _ = shape
    z_BGTrA = z_NQA.reshape(B, G, T, -1)
    return jnp.swapaxes(z_BGTrA, 1, 2).reshape(shape)


def runs_of_queries(bounds: tuple[Array, ...], num_heads: int, G: int) -> tuple[Array, ...]:
    """Returns the bounds of each query, [N, Q]: query i belongs to token i // r."""

    def of_queries(z_BT):
        B, T = z_BT.shape
        z_BGTr = jnp.broadcast_to(z_BT[:, None, :, None], (B, G, T, num_heads // G))
        return z_BGTr.reshape(B * G, -1)

    return tuple(of_queries(z_BT) for z_BT in bounds)


def dot(spec: str, a: Array, b: Array) -> Array:
    """Returns an einsum in the dtype of b, added up in a wide one."""
    wide = wide_dtype(b.dtype)
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=wide)
