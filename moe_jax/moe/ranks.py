"""Ranks within a class: which entries of a list come before an entry among those of its kind.

Shapes: N entries.
"""

import jax
import jax.numpy as jnp


def rank_in(class_N: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (rank, count, order) of entries that are sorted into classes; all int32.

    rank [N]: how many earlier entries share an entry's class.
    count [num_classes]: the entries of a class.
    order [N]: the stable sort by class.
    """
    # Of the classes 1 0 1 1 0: order 1 4 0 2 3, count 2 3, rank 0 0 1 2 1.
    order_N = jnp.argsort(class_N, stable=True).astype(jnp.int32)
    sorted_class_N = class_N[order_N]
    # The first place of each class in the sorted list, and at last its end.
    edges = jnp.arange(num_classes + 1, dtype=sorted_class_N.dtype)
    first_place = jnp.searchsorted(sorted_class_N, edges).astype(jnp.int32)
    place_N = jnp.arange(class_N.shape[0], dtype=jnp.int32)
    sorted_rank_N = place_N - first_place[sorted_class_N]
    # Back from the sorted list to the list as it was.
    rank_N = jnp.zeros_like(order_N).at[order_N].set(sorted_rank_N, unique_indices=True)
    return rank_N, jnp.diff(first_place), order_N


def rank_in_order(
    class_N: jax.Array, order_N: jax.Array | None, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (how many entries of an entry's class come before it in `order_N` [N], the entries of
    each class [num_classes]).

    `order_N` is a permutation; None: as they stand.
    """
    if order_N is None:
        rank_N, count, _ = rank_in(class_N, num_classes)
        return rank_N, count
    # Ranked along the order of priority, then put back to the places of the list.
    rank_N, count, _ = rank_in(class_N[order_N], num_classes)
    return jnp.zeros_like(rank_N).at[order_N].set(rank_N, unique_indices=True), count
