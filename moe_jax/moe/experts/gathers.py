"""The gathers between tokens and the rows of a dispatch buffer.

Both directions are gathers in the forward and in the backward pass: a scatter of floats costs
several times as much.

Shapes: T tokens, K choices per token, R rows, D model.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.parallel.varying import vary_alike
from moe_jax.precision import wide_dtype


def take_rows(x_TD: Array, src_R: Array, dest_TK: Array | None) -> Array:
    """Returns x_RD with x_RD[r] = x_TD[src_R[r]], zero where src_R[r] == T.

    `dest_TK` lists the rows of every token (R: none); it makes the backward pass a gather. Without
    it (None, a routing with no fixed number of choices per token) the backward pass is a
    scatter-add.
    """
    if dest_TK is None:
        return _gather(x_TD, src_R)
    return _gather_rows(*vary_alike(x_TD, src_R, dest_TK))


def sum_rows(y_RD: Array, dest_TK: Array | None, src_R: Array, num_tokens: int) -> Array:
    """Returns y_TD with y_TD[t] = the sum of the rows r that have src_R[r] == t.

    It is the transpose of `take_rows`.
    """
    if dest_TK is not None:
        return _gather_sum(*vary_alike(y_RD, dest_TK, src_R))
    y_RD, src_R = vary_alike(y_RD, src_R)
    zero_TD = jnp.zeros_like(y_RD, shape=(num_tokens, y_RD.shape[1]))
    return zero_TD.at[src_R].add(y_RD, mode="drop")


def _gather(x_TD: Array, index_N: Array) -> Array:
    """Returns rows of x by index, zero where it is out of bounds."""
    return x_TD.at[index_N].get(mode="fill", fill_value=0)


def _gather_and_add(y_RD: Array, dest_TK: Array) -> Array:
    """Returns the sum of every token's rows [T, D]."""
    # One gather per choice, added as it is read: a [T, K, D] array and its reduction cost twice
    # the time.
    wide = wide_dtype(y_RD.dtype)
    chosen = (_gather(y_RD, dest_TK[:, k]).astype(wide) for k in range(dest_TK.shape[1]))
    return functools.reduce(jnp.add, chosen).astype(y_RD.dtype)


# Each is the other's transpose. Integers have no cotangent, hence None.


@jax.custom_vjp
def _gather_rows(x_TD: Array, src_R: Array, dest_TK: Array) -> Array:
    return _gather(x_TD, src_R)


_gather_rows.defvjp(
    lambda x_TD, src_R, dest_TK: (_gather(x_TD, src_R), dest_TK),
    lambda dest_TK, dx_RD: (_gather_and_add(dx_RD, dest_TK), None, None),
)


@jax.custom_vjp
def _gather_sum(y_RD: Array, dest_TK: Array, src_R: Array) -> Array:
    return _gather_and_add(y_RD, dest_TK)


_gather_sum.defvjp(
    lambda y_RD, dest_TK, src_R: (_gather_and_add(y_RD, dest_TK), src_R),
    lambda src_R, dy_TD: (_gather(dy_TD, src_R), None, None),
)
