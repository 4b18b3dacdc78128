"""Integer bookkeeping that the dispatchers share: ranks within a class, and where each assignment's
row lies.

Shapes: N assignments, T tokens, R rows, e experts of this device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    """Holds the static sizes that a dispatcher works with."""

    # E, of the devices of the expert axis.
    num_experts: int
    # T, of this device.
    num_tokens: int
    # N, of this device: places in the list of assignments.
    num_assignments: int
    # Of them, what is filled when the load is as intended: less than N where a token may use fewer
    # than it may list. Of a chunk it may be no whole number.
    num_intended: float
    # Assignments of a token when every token has as many, in token order; else 0.
    per_token: int
    # Tokens that share capacity.
    group_tokens: int
    # The length of the expert axis.
    expert_axis: int
    # Devices that have the same tokens and assignments, and each num_experts experts of its own:
    # those of the axis `seq`.
    seq_axis: int = 1

    @property
    def local_experts(self) -> int:
        """Returns the number of experts on one device, e."""
        return self.num_experts // self.expert_axis

    @property
    def own_intended(self) -> float:
        """Returns the intended assignments to experts of this shape: the devices of `seq` share
        those of the list.
        """
        return self.num_intended / self.seq_axis

    @property
    def mean_load(self) -> float:
        """Returns the assignments of one expert, from the whole expert axis, if all places of the
        lists are filled and the load is balanced.
        """
        return self.num_assignments * self.expert_axis / (self.num_experts * self.seq_axis)


def round_up(n: int, multiple: int) -> int:
    """Returns the least multiple that is at least n."""
    return -(-n // multiple) * multiple


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


def assignment_of_row(row_N: jax.Array, num_rows: int) -> jax.Array:
    """Returns the assignment of each row, [R], or N where the row is void.

    It is the inverse of `row_N`, the row of each assignment; there row == num_rows is nowhere.
    """
    num_assignments = row_N.shape[0]
    void_R = jnp.full_like(row_N, num_assignments, shape=(num_rows,))
    assignment_N = jnp.arange(num_assignments, dtype=row_N.dtype)
    return void_R.at[row_N].set(assignment_N, mode="drop", unique_indices=True)
