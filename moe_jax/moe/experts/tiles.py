"""The experts' kernel of plain XLA for accelerators: one list of tiles, each of rows of one expert.

A step multiplies the B rows of a tile by the weights of its expert, which are read where they lie:
no array is E times anything, and no weight is copied for a tile. So the work follows the rows that
experts have and not the number of experts. Padding: the last tile of each expert is filled up, and
the list is filled up to whole rounds.

Shapes: see network.py; V tiles of the list, B rows of a tile.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.moe.experts.network import (
    KernelSizes,
    Layout,
    Rows,
    backward_rows,
    dot,
    forward_rows,
    of_expert,
)
from moe_jax.precision import wide_dtype

# Most tiles of a round. The number of rounds is known only at run time, which a GPU's host waits
# for before each; within a round it waits for nothing.
ROUND = 4
# Rows times weights of a round that take long beside that wait, by a data sheet: 50 microseconds of
# an H100's products. A tile of a large expert is enough by itself, and no round is filled up then.
ENOUGH = 25 * 10**9
# A tile is a quarter of the mean number of an expert's rows, between these. Each tile reads the
# weights of its expert and adds to their gradients in memory: on an H100 that takes as long as the
# products of 1000 rows.
FEWEST_ROWS, MOST_ROWS = 64, 2048


class Tiles(NamedTuple):
    """The list: tile v has the rows [first, end) of its expert."""

    expert_V: Array
    first_V: Array
    end_V: Array
    # How many there are; those behind them are empty.
    num_tiles: Array


def tile_rows(block: tuple[int, int], num_rows: int) -> int:
    """Returns B; `block` is that of `expert_ffn`, whose larger one is near the mean load."""
    return min(max(block[0] // 4, FEWEST_ROWS), MOST_ROWS, num_rows)


def tiles_of_round(B: int, num_weights: int) -> int:
    """Returns how many tiles a round has, for experts of so many weights."""
    return min(ROUND, math.ceil(ENOUGH / (B * num_weights)))


def padded_rows(sizes: KernelSizes) -> int:
    """Returns the rows that experts of random loads cost beyond their own: on average half a tile
    each, and half of a round but for one tile.
    """
    B = tile_rows(sizes.block, sizes.num_rows)
    return (sizes.num_experts + tiles_of_round(B, sizes.num_weights) - 1) * B // 2


def round_rows(sizes: KernelSizes) -> int:
    """Returns the rows of a round of the loop."""
    B = tile_rows(sizes.block, sizes.num_rows)
    return B * tiles_of_round(B, sizes.num_weights)


def list_tiles(layout: Layout, num_rows: int, B: int, per_round: int) -> Tiles:
    """Returns the tiles of B rows that cover the rows of each expert, in order of experts; room
    for whole rounds.
    """
    start_e, size_e = layout
    num_experts = size_e.shape[0]
    # An expert fills all of its tiles but one.
    most = num_rows // B + num_experts
    most = -(-most // per_round) * per_round
    count_e = -(-size_e // B)
    until_e = jnp.cumsum(count_e, dtype=count_e.dtype)
    tile_V = jnp.arange(most, dtype=size_e.dtype)
    # How many experts end at or before a tile is the number of the expert that it is of.
    is_before_Ve = until_e[None] <= tile_V[:, None]
    # A tile behind the last one gets the last expert, and no rows of it.
    expert_V = jnp.minimum(is_before_Ve.sum(1, dtype=size_e.dtype), num_experts - 1)
    # A tile's place among those of its expert, times B.
    first_V = start_e[expert_V] + (tile_V - (until_e - count_e)[expert_V]) * B
    end_V = jnp.minimum(first_V + B, (start_e + size_e)[expert_V])
    return Tiles(expert_V, first_V, end_V, until_e[-1])


def forward(
    act: Callable[[Array], Array], block: tuple[int, int], rows: Rows, layout: Layout
) -> tuple[Array, Array]:
    """Returns (y_RD, pre_RH): the results, and the pre-activations that the backward pass reads."""
    x_RD, gate_R, w_in_eDH, w_out_eFD, biases = rows
    dtype = x_RD.dtype
    B = tile_rows(block, x_RD.shape[0])

    def step(carry: tuple[Array, Array], i: Array, window: "_Window") -> tuple[Array, Array]:
        y_RD, pre_RH = carry
        w_in_DH, w_out_FD = w_in_eDH[i].astype(dtype), w_out_eFD[i].astype(dtype)
        x_BD, gate_B = window.own(x_RD), window.all(gate_R)
        own = of_expert(biases, i)
        y_BD, pre_BH = forward_rows(act, x_BD, gate_B, w_in_DH, w_out_FD, own)
        return window.put(y_RD, y_BD), window.put(pre_RH, pre_BH)

    y_RD = jnp.zeros_like(x_RD)
    pre_RH = jnp.zeros_like(x_RD, shape=(x_RD.shape[0], w_in_eDH.shape[2]))
    return _fold(step, (y_RD, pre_RH), layout, rows, B)


def backward(
    act: Callable[[Array], Array],
    block: tuple[int, int],
    rows: Rows,
    layout: Layout,
    pre_RH: Array,
    dy_RD: Array,
) -> Rows:
    """Returns the cotangents of the rows from that of y; `backward_rows` has the equations."""
    x_RD, gate_R, w_in_eDH, w_out_eFD, biases = rows
    dtype = x_RD.dtype
    wide = wide_dtype(dtype)
    B = tile_rows(block, x_RD.shape[0])

    def step(sums: Rows, i: Array, window: "_Window") -> Rows:
        w_in_DH, w_out_FD = w_in_eDH[i].astype(dtype), w_out_eFD[i].astype(dtype)
        own = of_expert(biases, i)
        some = Rows(window.own(x_RD), window.all(gate_R), w_in_DH, w_out_FD, own)
        # It is zero beyond the tile's rows, so all that follows is.
        dy_BD = window.own(dy_RD)
        of_some = backward_rows(act, some, window.own(pre_RH), dy_BD, _outer)
        return Rows(
            window.put(sums.x_RD, of_some.x_RD),
            window.put(sums.gate_R, of_some.gate_R),
            sums.w_in_eDH.at[i].add(of_some.w_in_eDH),
            sums.w_out_eFD.at[i].add(of_some.w_out_eFD),
            jax.tree.map(lambda sum, new: sum.at[i].add(new), sums.biases, of_some.biases),
        )

    def zeros(array: Array, dtype: Any) -> Array:
        return jnp.zeros_like(dy_RD, shape=array.shape, dtype=dtype)

    # Weights' are added up in a wide type.
    sums = Rows(
        zeros(x_RD, dtype),
        zeros(gate_R, wide),
        zeros(w_in_eDH, wide),
        zeros(w_out_eFD, wide),
        jax.tree.map(lambda bias: zeros(bias, wide), biases),
    )
    sums = _fold(step, sums, layout, rows, B)
    return jax.tree.map(lambda total, array: total.astype(array.dtype), sums, rows)


def _outer(a_BX: Array, b_BY: Array, dtype: Any) -> Array:
    """Returns a^T @ b [X, Y]."""
    return dot(a_BX, b_BY, 0, 0, dtype)


class _Window(NamedTuple):
    """B rows of the buffer from `offset` on, those of one tile among them."""

    offset: Array
    is_own_B: Array

    def all(self, array_RX: Array) -> Array:
        return lax.dynamic_slice_in_dim(array_RX, self.offset, self.is_own_B.shape[0])

    def own(self, array_RX: Array) -> Array:
        """Returns the rows, those of others as zeros."""
        return jnp.where(self.is_own_B[:, None], self.all(array_RX), 0)

    def put(self, array_RX: Array, new_BX: Array) -> Array:
        """Returns the array with the tile's rows as they are in `new_BX`."""
        is_own = self.is_own_B if array_RX.ndim == 1 else self.is_own_B[:, None]
        some_BX = jnp.where(is_own, new_BX.astype(array_RX.dtype), self.all(array_RX))
        return lax.dynamic_update_slice_in_dim(array_RX, some_BX, self.offset, 0)


def _fold(step: Callable[..., Any], carry: Any, layout: Layout, rows: Rows, B: int) -> Any:
    """Folds `step(carry, expert, window)` over all tiles."""
    num_rows = rows.x_RD.shape[0]
    num_weights = math.prod(rows.w_in_eDH.shape[1:]) + math.prod(rows.w_out_eFD.shape[1:])
    per_round = tiles_of_round(B, num_weights)
    tiles = list_tiles(layout, num_rows, B, per_round)

    def one(v: Array, carry: Any) -> Any:
        first, end = tiles.first_V[v], tiles.end_V[v]
        # The last rows of the buffer have no B rows behind them.
        offset = jnp.clip(first, 0, num_rows - B)
        row_B = offset + jnp.arange(B, dtype=offset.dtype)
        window = _Window(offset, (row_B >= first) & (row_B < end))
        return step(carry, tiles.expert_V[v], window)

    def one_round(j: Array, carry: Any) -> Any:
        return lax.fori_loop(0, per_round, lambda u, carry: one(j * per_round + u, carry), carry)

    return lax.fori_loop(0, -(-tiles.num_tiles // per_round), one_round, carry)
