"""Integer bookkeeping that the dispatchers share: sizes, and where each assignment's row lies.

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


def assignment_of_row(row_N: jax.Array, num_rows: int) -> jax.Array:
    """Returns the assignment of each row, [R], or N where the row is void.

    It is the inverse of `row_N`, the row of each assignment; there row == num_rows is nowhere.
    """
    num_assignments = row_N.shape[0]
    void_R = jnp.full_like(row_N, num_assignments, shape=(num_rows,))
    assignment_N = jnp.arange(num_assignments, dtype=row_N.dtype)
    return void_R.at[row_N].set(assignment_N, mode="drop", unique_indices=True)
