"""Small dense parts of a block, in global view: gathers, norms, rotary embeddings, the dense
feed-forward, dropout.

Shapes: B rows, S sequence, D model, F hidden, P = 2 (gate, up) for SwiGLU or 1 for GELU, A head
width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from moe_jax.moe.experts.grouped_matmul import wide_dtype
from moe_jax.parallel.mesh import BATCH, P, spec
from moe_jax.weights import Weight, Weights


def gather(weight: jax.Array, names: tuple[str | None, ...], dtype: DTypeLike) -> jax.Array:
    """A weight without its FSDP split, for one use, in the compute dtype.

    Explicit: an einsum that resolves it doubles collectives.
    """
    return jax.sharding.reshard(
        weight.astype(dtype), spec(*(None if name == "embed" else name for name in names))
    )


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / rms(x) * scale over the last dimension, in at least float32 (Zhang & Sennrich 2019,
    arXiv:1910.07467).
    """
    wide = x.astype(wide_dtype(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * inverse).astype(x.dtype) * jnp.expand_dims(
        scale.astype(x.dtype), tuple(range(x.ndim - 1))
    )


def rope(
    position_BS: jax.Array, head_dim: int, theta: float, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, S, 1, A] of the rotary angles (Su et al. 2021, arXiv:2104.09864); the halves
    of a head are the pairs.
    """
    wide = wide_dtype(dtype)
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=wide) / head_dim)
    angle = (
        position_BS.astype(wide)[:, :, None, None]
        * jnp.concatenate([frequency, frequency])[None, None, None, :]
    )
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BSHA: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    half = x_BSHA.shape[-1] // 2
    turned = jnp.concatenate([-x_BSHA[..., half:], x_BSHA[..., :half]], axis=-1)
    return (x_BSHA * cos + turned * sin).astype(x_BSHA.dtype)


def dropout(x_BSD: jax.Array, rate: float, rng: jax.Array, row_B: jax.Array) -> jax.Array:
    """Zeroes entries with probability `rate`.

    The key folds in the global row, so the mask is the same on every mesh and micro-batch.
    """
    if rate == 0:
        return x_BSD

    def draw(row):
        return jax.random.bernoulli(jax.random.fold_in(rng, row), 1 - rate, x_BSD.shape[1:])

    return jnp.where(jax.vmap(draw)(row_B), x_BSD / (1 - rate), 0)


def activate(h: jax.Array, activation: str) -> jax.Array:
    """[..., P, F] -> [..., F]: silu(gate) * up (Shazeer 2020, arXiv:2002.05202), or GELU (its tanh
    approximation), as the experts do.
    """
    if activation == "swiglu":
        return jax.nn.silu(h[..., 0, :]) * h[..., 1, :]
    return jax.nn.gelu(h[..., 0, :])


class FeedForward(nnx.Module):
    """A dense feed-forward of hidden width F: also the shared experts of an MoE block (n of width F
    are one of width n F).
    """

    def __init__(
        self,
        key: jax.Array,
        d_model: int,
        hidden: int,
        activation: str,
        out_std: float,
        param_dtype: str,
    ):
        p = 2 if activation == "swiglu" else 1
        declared = {
            "w_in": Weight((d_model, p, hidden), ("embed", None, "hidden"), d_model**-0.5),
            "w_out": Weight((hidden, d_model), ("hidden", "embed"), out_std),
        }
        self.activation = activation
        self.weights = Weights(key, declared, param_dtype)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        w_in = gather(self.weights["w_in"], ("embed", None, "hidden"), x_BSD.dtype)
        w_out = gather(self.weights["w_out"], ("hidden", "embed"), x_BSD.dtype)
        h_BSF = activate(jnp.einsum("BSD,DPF->BSPF", x_BSD, w_in), self.activation)
        return jnp.einsum("BSF,FD->BSD", h_BSF, w_out, out_sharding=P(BATCH, None, None))
