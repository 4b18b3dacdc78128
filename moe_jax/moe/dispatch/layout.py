"""Integer bookkeeping that the dispatchers share: ranks within a class, and where each assignment's
row lies.

Shapes: N assignments, T tokens, R rows, e experts of this device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    """The static sizes a dispatcher works with."""

    num_experts: int
    num_tokens: int  # T, of this device
    num_assignments: int  # N, of this device: places in the list
    # of them, what is filled when the load is as intended: less than N where a token may use fewer
    # than it may list
    num_intended: int
    per_token: int  # assignments per token when every token has as many, in token order; else 0
    group_tokens: int  # tokens that share capacity
    expert_axis: int  # length of the expert axis


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def rank_in(class_N: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(rank, count, order): how many earlier entries share an entry's class [N]; entries per class
    [num_classes]; the stable sort [N].
    """
    order_N = jnp.argsort(class_N, stable=True).astype(jnp.int32)
    sorted_N = class_N[order_N]
    edges = jnp.searchsorted(sorted_N, jnp.arange(num_classes + 1, dtype=sorted_N.dtype)).astype(
        jnp.int32
    )
    rank_sorted_N = jnp.arange(class_N.shape[0], dtype=jnp.int32) - edges[sorted_N]
    return (
        jnp.zeros_like(order_N).at[order_N].set(rank_sorted_N, unique_indices=True),
        jnp.diff(edges),
        order_N,
    )


def rank_in_order(class_N: jax.Array, order_N: jax.Array | None, num_classes: int) -> jax.Array:
    """How many entries of an entry's class come before it in `order_N` (a permutation; None: as
    they stand), [N].
    """
    if order_N is None:
        return rank_in(class_N, num_classes)[0]
    rank_N, _, _ = rank_in(class_N[order_N], num_classes)
    return jnp.zeros_like(rank_N).at[order_N].set(rank_N, unique_indices=True)


def assignment_of_row(row_N: jax.Array, num_rows: int) -> jax.Array:
    """The inverse of `row_N` (row == num_rows: nowhere): for each row its assignment, or N where
    the row is void.
    """
    num = row_N.shape[0]
    empty_R = jnp.full_like(row_N, num, shape=(num_rows,))
    return empty_R.at[row_N].set(
        jnp.arange(num, dtype=row_N.dtype), mode="drop", unique_indices=True
    )
