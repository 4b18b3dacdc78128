"""Small dense parts of a block, in global view: gathers, norms, rotary embeddings, the dense
feed-forward, dropout.

Shapes: B rows, S sequence, D model, F hidden, P = 2 (gate, up) for SwiGLU or 1 for GELU, A head
width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from moe_jax.moe.activations import ACTIVATIONS
from moe_jax.moe.experts import narrow
from moe_jax.moe.experts.network import Chosen
from moe_jax.parallel import context
from moe_jax.parallel.apart import apart
from moe_jax.parallel.mesh import RANK, spec
from moe_jax.precision import wide_dtype
from moe_jax.schema.config import ModelConfig
from moe_jax.weights import Weight, Weights

# Of so many the cosines and sines are computed once, in a loop of their own.
MANY_POSITIONS = 256


def gather(weight: Array, names: tuple[str | None, ...], dtype: DTypeLike) -> Array:
    """Returns a weight without its FSDP split, for one use, in the compute dtype.

    Explicit: an einsum that resolves it doubles collectives.
    """
    # The dimension of d_model, or a rank, is the one that FSDP splits.
    whole = [None if name in ("embed", RANK) else name for name in names]
    with jax.named_scope("gather_weights"):
        return jax.sharding.reshard(weight.astype(dtype), spec(*whole))


def scale_of_norm(
    shape: tuple[int, ...], names: tuple[str | None, ...], cfg: ModelConfig
) -> Weight:
    """Returns the scale of an RMSNorm, by which it multiplies by 1 at first."""
    return Weight(shape, names, 0.0, 0.0 if cfg.norm_plus_one else 1.0)


def norm(x: Array, scale: Array, cfg: ModelConfig) -> Array:
    """Returns the RMSNorm of the config."""
    return rms_norm(x, scale, cfg.norm_epsilon, cfg.norm_plus_one)


def rms_norm(x: Array, scale: Array, epsilon: float, plus_one: bool) -> Array:
    """Returns x / rms(x) * scale over the dimensions of the scale, the last of x, in at least
    float32 (Zhang & Sennrich 2019, arXiv:1910.07467).

    `plus_one`: times 1 + scale, as in the released code of Gemma (arXiv:2403.08295).
    """
    wide = x.astype(wide_dtype(x.dtype))
    own = tuple(range(x.ndim - scale.ndim, x.ndim))
    mean_square = jnp.mean(jnp.square(wide), axis=own, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + epsilon)
    # The scale gets the dimensions of x: a broadcast that is not written is an error here.
    leading = tuple(range(x.ndim - scale.ndim))
    if plus_one:
        # Near 1 a narrow dtype would round small scales away.
        factor = 1 + jnp.expand_dims(scale.astype(wide.dtype), leading)
        return (normed * factor).astype(x.dtype)
    return normed.astype(x.dtype) * jnp.expand_dims(scale.astype(x.dtype), leading)


def rope(
    position_BS: Array,
    head_dim: int,
    theta: float,
    dtype: str,
    scaled: Callable[[Array], Array],
) -> tuple[Array, Array]:
    """Returns cos and sin [B, S, 1, A] of the rotary angles (Su et al. 2021, arXiv:2104.09864).

    The halves of a head are the pairs.

    `scaled`: what becomes of their frequencies (models/rope_scalings).
    """
    # In bfloat16 positions above 256 would not be told apart.
    wide = wide_dtype(dtype)
    exponent = -jnp.arange(0, head_dim, 2, dtype=wide) / head_dim
    frequency = scaled(theta**exponent)
    # Both numbers of a pair turn by one angle.
    frequency_A = jnp.concatenate([frequency, frequency])
    place_BS11 = position_BS.astype(wide)[:, :, None, None]
    angle_BS1A = place_BS11 * frequency_A[None, None, None, :]
    angles = angle_BS1A, angle_BS1A
    # On a mesh, to ask one position would be a collective.
    if position_BS.size < MANY_POSITIONS or jax.sharding.get_abstract_mesh().size > 1:
        return _cos_and_sin(angles)
    # Else a CPU computes them for every head, and in each use again.
    return apart(_cos_and_sin, angles, position_BS[0, 0])


def _cos_and_sin(angles: tuple[Array, Array]) -> tuple[Array, Array]:
    """Returns the cosine of the first angles and the sine of the second ones."""
    return jnp.cos(angles[0]), jnp.sin(angles[1])


@jax.custom_vjp
def rotate(x_BSHA: Array, cos: Array, sin: Array) -> Array:
    """Returns queries or keys turned by the angles of their positions."""
    half = x_BSHA.shape[-1] // 2
    first, second = x_BSHA[..., :half], x_BSHA[..., half:]
    # A pair (a, b) turned by a right angle is (-b, a).
    turned = jnp.concatenate([-second, first], axis=-1)
    rotated = x_BSHA * cos + turned * sin
    return rotated.astype(x_BSHA.dtype)


def _rotate_forward(x_BSHA: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return rotate(x_BSHA, cos, sin), (cos, sin)


def _rotate_backward(angles: tuple[Array, Array], dy_BSHA: Array) -> tuple[Array, None, None]:
    # Turned back. Left to autodiff, each half is padded to a whole and both are added.
    cos, sin = angles
    # Positions have no gradient.
    return rotate(dy_BSHA, cos, -sin), None, None


rotate.defvjp(_rotate_forward, _rotate_backward)


def dropout(x_BSD: Array, rate: float, rng: Array, row_B: Array) -> Array:
    """Zeroes entries with probability `rate`.

    The key folds in the global row, so the mask is the same on every mesh and micro-batch.
    """
    if rate == 0:
        return x_BSD
    kept = 1 - rate

    def draw(row):
        key = jax.random.fold_in(rng, row)
        return jax.random.bernoulli(key, kept, x_BSD.shape[1:])

    is_kept_BSD = jax.vmap(draw)(row_B)
    if context.is_split(x_BSD):
        # Drawn for whole rows, of which each device takes its own tokens.
        is_kept_BSD = context.enter(is_kept_BSD)
    # What is kept grows, so that the expectation stays as it was.
    return jnp.where(is_kept_BSD, x_BSD / kept, 0)


def activate(parts: Sequence[Array], chosen: Chosen) -> Array:
    """Returns the activation of one or two arrays [..., F], as the experts do."""
    kind = ACTIVATIONS[chosen.activation]
    options = kind.options() if chosen.options is None else chosen.options
    return (kind.lean or kind.of)(options, *parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(x: Array, w: Array, dtype: DTypeLike, out_sharding: Any = None) -> Array:
    """Returns x @ w [B, S, *F], added up in `dtype`, of x [B, S, *D] and w [*D, *F].

    The gradient of w is x^T @ dy. Autodiff takes dy^T @ x and transposes it, for which a CPU first
    transposes dy in memory. That is the slower way where dy is wider than x, where several products
    have the same x, or where dy is computed on the way (queries and keys that turn).

    `out_sharding` is needed where D is split: the sum over it is a reduction.
    """
    over, of_w = _summed(x)
    return _contract(x, w, (over, of_w), dtype, out_sharding)


def _linear_forward(
    x: Array, w: Array, dtype: DTypeLike, out_sharding: Any
) -> tuple[Array, tuple[Array, Array]]:
    return linear(x, w, dtype, out_sharding), (x, w)


def _linear_backward(
    dtype: DTypeLike, out_sharding: Any, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = residuals
    # Logits are wider (float32) than x and w. A product of a wide and a narrow factor is computed
    # in the wide dtype, which is slower.
    dy = dy.astype(x.dtype)
    _, of_w = _summed(x)
    columns = tuple(range(len(of_w), w.ndim))
    of_dy, _ = _summed(dy)
    rows = (0, 1)
    # Where F is split over `model`, or rows over devices, each has a part of a sum.
    dx = _contract(dy, w, (of_dy, columns), dtype, jax.typeof(x).sharding)
    dw = _contract(x, dy, (rows, rows), dtype, jax.typeof(w).sharding)
    return dx.astype(x.dtype), dw.astype(w.dtype)


linear.defvjp(_linear_forward, _linear_backward)


def _summed(x: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns which dimensions of x [B, S, *D] are summed over, and which of w [*D, *F]."""
    return tuple(range(2, x.ndim)), tuple(range(x.ndim - 2))


def _contract(a: Array, b: Array, dims: Any, dtype: DTypeLike, sharding: Any) -> Array:
    """Returns the product of a and b over dimensions `dims` of each."""
    return jax.lax.dot_general(
        a, b, (dims, ((), ())), preferred_element_type=dtype, out_sharding=sharding
    )


class FeedForward(nnx.Module):
    """A dense feed-forward of hidden width F: also the shared experts of an MoE block (n of width F
    are one of width n F).

    `gated`: the output is multiplied by sigmoid(x w), one number for each token. `numbers`: what
    its forward products are of, "full" or one of narrow.KINDS.
    """

    def __init__(
        self,
        key: Array,
        d_model: int,
        hidden: int,
        chosen: Chosen,
        out_std: float,
        param_dtype: str,
        gated: bool = False,
        numbers: str = narrow.FULL,
    ):
        # Gate and up have an axis of their own, so that F can be split without pairing wrong ones.
        p = chosen.parts
        declared = {
            "w_in": Weight((d_model, p, hidden), ("embed", None, "hidden"), d_model**-0.5),
            "w_out": Weight((hidden, d_model), ("hidden", "embed"), out_std),
        }
        if gated:
            declared["gate"] = Weight((d_model,), ("embed",), d_model**-0.5)
        self.chosen, self.gated, self.numbers = chosen, gated, numbers
        self.weights = Weights(key, declared, param_dtype)

    def __call__(self, x_BSD: Array) -> Array:
        w_in_DPF = gather(self.weights["w_in"], ("embed", None, "hidden"), x_BSD.dtype)
        w_out = gather(self.weights["w_out"], ("hidden", "embed"), x_BSD.dtype)
        # A product for each part: the gradient of one array of both would be put together from
        # arrays of its size.
        with jax.named_scope("feed_forward"):
            parts = [self._widened(x_BSD, w_in_DPF[:, i]) for i in range(w_in_DPF.shape[1])]
            y_BSD = self._narrowed(activate(parts, self.chosen), w_out)
        if not self.gated:
            return y_BSD
        gate_D = gather(self.weights["gate"], ("embed",), x_BSD.dtype)
        gate_BS = jax.nn.sigmoid(jnp.einsum("BSD,D->BS", x_BSD, gate_D))
        return y_BSD * gate_BS[:, :, None]

    def _widened(self, x_BSD: Array, w_DF: Array) -> Array:
        """Returns x @ w [B, S, F]."""

        def product(x_BSD: Array, w_DF: Array) -> Array:
            return linear(x_BSD, w_DF, x_BSD.dtype)

        return self._by_numbers(product, x_BSD, w_DF)

    def _narrowed(self, h_BSF: Array, w_FD: Array) -> Array:
        """Returns h @ w [B, S, D]."""
        # F is split over `model`: the sum over it is a reduction, told of by its output.
        tokens = context.tokens_spec(h_BSF, None)

        def product(h_BSF: Array, w_FD: Array) -> Array:
            return jnp.einsum("BSF,FD->BSD", h_BSF, w_FD, out_sharding=tokens)

        return self._by_numbers(product, h_BSF, w_FD)

    def _by_numbers(self, product: Callable[..., Array], a: Array, w: Array) -> Array:
        if self.numbers == narrow.FULL:
            return product(a, w)
        return narrow.dense(a, w, self.numbers, product)
