"""The rows that a device serves when nothing is dropped: where they lie, and in how many rounds.

The rows of an expert lie together, and each expert begins at a whole block of the grouped product.
What is held at once is a window of that layout, of `num_rows` rows. One window has room for all, or
each round serves the next one.

Shapes: n devices of a level, e experts of each.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe import kept
from moe_jax.moe.dispatch.layout import Shape, round_up
from moe_jax.moe.experts.blocks import block_sizes


def block(shape: Shape) -> tuple[int, int]:
    """Returns the blocks of the grouped product for the mean load of an expert."""
    return block_sizes(shape.mean_load)


def worst(shape: Shape) -> int:
    """Returns the rows that one device may have to serve."""
    e = shape.local_experts
    _, small_block = block(shape)
    local_assignments = shape.num_assignments
    if shape.per_token:
        # A token's experts are distinct, so at most min(k, e) of them are local.
        local_assignments = min(shape.per_token, e) * shape.num_tokens
    # The room of every expert is rounded up to whole blocks.
    num_rows = shape.expert_axis * local_assignments + e * (small_block - 1)
    return round_up(num_rows, small_block)


def rooms(size_ne: jax.Array, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """Returns (where the room of each expert begins, the rows of all rooms), of the numbers of rows
    of a device's experts, [..., e].
    """
    # Each expert starts at a multiple of the small block.
    _, small_block = block(shape)
    room_ne = -(-size_ne // small_block) * small_block
    # The exclusive sum.
    return jnp.cumsum(room_ne, axis=-1) - room_ne, room_ne.sum(-1, dtype=room_ne.dtype)


def part(
    start: jax.Array, size: jax.Array, offset: Any, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (first, size) of the part of runs of rows that lies in [offset, offset + num_rows),
    counted from the offset; of size 0 where there is none.
    """
    first = jnp.clip(start - offset, 0, num_rows)
    return first, jnp.clip(start + size - offset, 0, num_rows) - first


def serve_in_rounds(
    serve: Callable[..., jax.Array],
    x: jax.Array,
    gate: jax.Array,
    num_needed: jax.Array,
    shape: Shape,
    num_rows: int,
) -> jax.Array:
    """Returns the sum over all rounds of `serve(x, gate, offset, num_rows)`.

    Args:
      serve: what becomes of the rows [offset, offset + num_rows) of the layout.
      num_needed: the rows of the layout that are filled. Where `serve` has collectives, the devices
          that meet in them must give the same number.
      num_rows: the rows of a round.
    """
    num_rounds = -(-worst(shape) // num_rows)
    if num_rounds == 1:
        return serve(x, gate, 0, num_rows)
    return _several(serve, x, gate, num_needed, num_rows, num_rounds)


def _several(
    serve: Callable[..., jax.Array],
    x: jax.Array,
    gate: jax.Array,
    num_needed: jax.Array,
    num_rows: int,
    num_rounds: int,
) -> jax.Array:
    """Returns the sum of rounds of `num_rows` rows; rounds that nobody needs are skipped."""

    def one_round(y: jax.Array, offset: jax.Array) -> tuple[jax.Array, None]:
        def run(x: jax.Array, gate: jax.Array) -> jax.Array:
            # A policy would keep what is named of every round, needed or not.
            with kept.nothing():
                return serve(x, gate, offset, num_rows)

        def skip(x: jax.Array, gate: jax.Array) -> jax.Array:
            del x, gate
            return jnp.zeros_like(y)

        return y + jax.lax.cond(offset < num_needed, run, skip, x, gate), None

    # The first round runs in any case, and is the carry that the others add to.
    first_y = serve(x, gate, 0, num_rows)
    offsets = jnp.arange(1, num_rounds, dtype=jnp.int32) * num_rows

    def further(y: jax.Array) -> jax.Array:
        # Rematerialised, so that the buffers of one round exist at a time.
        y, _ = jax.lax.scan(jax.checkpoint(one_round), y, offsets)
        return y

    # Asked once: a round that is skipped still adds zeros to all sums and gradients.
    return jax.lax.cond(num_rows < num_needed, further, lambda y: y, first_y)
