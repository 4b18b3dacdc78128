"""Products of narrow numbers, int8 or float8: each row and each column is rounded with a scale of
its own.

    a @ w  ~  s_b t_y * sum over x of a'[b, x] w'[x, y],   a' = round(a / s),  w' = round(w / t)

s_b is the largest |a| of row b divided by the largest narrow number, t_y that of column y: "per
token" and "per channel" scales (int8: SmoothQuant, arXiv:2211.10438, section 2; float8, e4m3:
arXiv:2209.05433). They are computed anew at each product, so there is nothing to calibrate.

Only the forward pass is narrow. Gradients are those of the whole product, in its dtype: rounding
counts as the identity (the straight-through estimator, arXiv:1308.3432).

`error` bounds what rounding changes.

Shapes: B rows; X, Y widths of a weight; e experts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.parallel.compiling import by_platform
from moe_jax.precision import wide_dtype

FULL = "full"


class Kind(NamedTuple):
    """Narrow numbers."""

    dtype: Any
    # The largest of them.
    most: float
    # In what products of them are added up.
    sums: Any
    # A number a is off by at most max(|a| * relative, step), where step is in units of the scale.
    relative: float
    step: float


KINDS = {
    "int8": Kind(jnp.dtype(jnp.int8), 127.0, jnp.int32, 0.0, 0.5),
    # Three digits behind the first one; the smallest number is 2^-9.
    "float8": Kind(jnp.dtype(jnp.float8_e4m3fn), 448.0, jnp.float32, 2.0**-4, 2.0**-10),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """An array as narrow numbers times scales. It stands where a kernel has a weight."""

    values: Array
    # In the wide dtype of the array; of length 1 along the dimension that a product sums over.
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def astype(self, dtype: Any) -> "Rounded":
        """Returns itself: it is rounded for its use already."""
        del dtype
        return self

    def __getitem__(self, i: Any) -> "Rounded":
        return jax.tree.map(lambda array: array[i], self)


def rounded(array: Array, axis: int, kind: str) -> Rounded:
    """Rounds an array whose dimension `axis` a product sums over."""
    numbers = KINDS[kind]
    wide = array.astype(wide_dtype(array.dtype))
    largest = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
    # Zeros alone stay zeros.
    scale = jnp.where(largest == 0, 1, largest / numbers.most)
    scaled = wide / scale
    if jnp.issubdtype(numbers.dtype, jnp.integer):
        scaled = jnp.round(scaled)
    return Rounded(scaled.astype(numbers.dtype), scale)


def like(array: Array, axis: int, other: Rounded) -> Rounded:
    """Rounds an array to the narrow numbers of another."""
    kinds = (name for name, kind in KINDS.items() if kind.dtype == other.values.dtype)
    return rounded(array, axis, next(kinds))


def is_narrow(dtype: Any) -> bool:
    """Returns whether numbers of this dtype are narrow."""
    return any(kind.dtype == dtype for kind in KINDS.values())


def sums_dtype(dtype: Any) -> Any:
    """Returns the dtype that products of arrays of `dtype` are added up in."""
    for kind in KINDS.values():
        if kind.dtype == dtype:
            return kind.sums
    return wide_dtype(dtype)


def times(a_BX: Array, w_XY: Rounded, dtype: Any) -> Array:
    """Returns a @ w in `dtype`."""
    a = like(a_BX, 1, w_XY)
    sums_BY = _contract(a.values, w_XY.values, a.scale.dtype, None)
    return (sums_BY * a.scale * w_XY.scale).astype(dtype)


def dense(a_BSX: Array, w_XY: Array, kind: str, plain: Callable[..., Array]) -> Array:
    """Returns a @ w [B, S, Y] by narrow numbers, in global view.

    `plain(a, w)` is the product itself: it says how the result is sharded, and has the gradients.
    """
    whole = jax.eval_shape(plain, a_BSX, w_XY)

    def forward(a_BSX: Array, w_XY: Array) -> Array:
        a, w = rounded(a_BSX, 2, kind), rounded(w_XY, 0, kind)
        sums_BSY = _contract(a.values, w.values, a.scale.dtype, whole.sharding)
        return (sums_BSY * a.scale * w.scale[None]).astype(whole.dtype)

    return _straight_through(forward, plain)(a_BSX, w_XY)


def error(a_BX: Array, w_XY: Array, kind: str) -> Array:
    """Returns a bound [B, Y] of what rounding both factors changes in a @ w.

    With a' = a + da and w' = w + dw: |a' w' - a w| <= |a| |dw| + |da| |w| + |da| |dw|.
    """
    numbers = KINDS[kind]

    def off(array: Array, axis: int) -> Array:
        scale = jnp.max(jnp.abs(array), axis=axis, keepdims=True) / numbers.most
        return jnp.maximum(jnp.abs(array) * numbers.relative, scale * numbers.step)

    da, dw = off(a_BX, 1), off(w_XY, 0)
    return jnp.abs(a_BX) @ dw + da @ jnp.abs(w_XY) + da @ dw


def _contract(a: Array, w_XY: Array, dtype: Any, sharding: Any) -> Array:
    """Returns the product of narrow numbers, over the last dimension of a, in `dtype`."""
    dims = (((a.ndim - 1,), (0,)), ((), ()))

    def product(a: Array, w: Array, sums: Any) -> Array:
        return lax.dot_general(a, w, dims, preferred_element_type=sums, out_sharding=sharding)

    def narrow(a: Array, w: Array) -> Array:
        return product(a, w, sums_dtype(a.dtype)).astype(dtype)

    def as_wide(a: Array, w: Array) -> Array:
        return product(a.astype(dtype), w.astype(dtype), dtype)

    # A CPU has no units for narrow numbers, and XLA's loops over them are slow. A wide product of
    # them is the same.
    return by_platform(a, w_XY, cpu=as_wide, others=narrow)


def _straight_through(
    forward: Callable[..., Array], plain: Callable[..., Array]
) -> Callable[..., Array]:
    """Returns a function with the values of one and the gradients of the other."""

    def backward(operands: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
        _, pull = jax.vjp(plain, *operands)
        return pull(cotangent)

    function = jax.custom_vjp(forward)
    function.defvjp(lambda *operands: (forward(*operands), operands), backward)
    return function
