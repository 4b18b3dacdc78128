"""A ragged all-to-all over the expert axis: to each device go as many rows as it is to have, and
no padding.

`exchange` is `jax.lax.ragged_all_to_all` where the platform has it (TPUs, GPUs). XLA has none for
CPUs (jax #34755), so there it is `twin`, which has the same signature and the same result, and
sends more. Both have the backward pass that is written here: the same rows travel back.

A sender's rows for one receiver may be several slices; each slice has a place of its own in the
receiver's buffer. Slices are numbered by device and, within it, by place: slice i of a sender goes
to device i // m, where m is the number of slices that each pair of devices exchanges.

Shapes: n devices of a group, m slices of a pair, S = n m slices, R rows sent, Q rows of the buffer
that receives.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch.levels import Level
from moe_jax.parallel.compiling import by_platform
from moe_jax.parallel.varying import vary_alike


class Slices(NamedTuple):
    """Slices that this device sends; int32 [S] each."""

    # The first row of each, and how many there are.
    start_S: jax.Array
    size_S: jax.Array
    # Where the first row comes to lie in the buffer of the receiver.
    target_S: jax.Array


class Journey(NamedTuple):
    """Rows that travel, and the same rows on their way back."""

    there: Slices
    back: Slices

    def reversed(self) -> "Journey":
        return Journey(self.back, self.there)


def exchange(
    x: jax.Array, journey: Journey, num_rows: int, level: Level, check: bool = False
) -> jax.Array:
    """Returns what this device receives, [num_rows, ...] of [R, ...]; zero where nothing arrives.

    Slices that are sent must not overlap: the backward pass would lose one of them. `check`: bits
    are counted before and after, forward and backward, and all is NaN where they differ.
    """
    x, *numbers = vary_alike(x, *journey.there, *journey.back)
    return _exchange(x, *numbers, num_rows, level, check)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _exchange(
    x: jax.Array,
    start_S: jax.Array,
    size_S: jax.Array,
    target_S: jax.Array,
    back_start_S: jax.Array,
    back_size_S: jax.Array,
    back_target_S: jax.Array,
    num_rows: int,
    level: Level,
    check: bool,
) -> jax.Array:
    there = Slices(start_S, size_S, target_S)
    back = Slices(back_start_S, back_size_S, back_target_S)
    # Rows that nothing arrives in stay as they are here.
    buffer = jnp.zeros_like(x, shape=(num_rows, *x.shape[1:]))
    how = {"axis_name": "expert", "axis_index_groups": level.groups}
    received = by_platform(
        *(x, buffer, *there, back.size_S),
        cpu=functools.partial(twin, **how),
        others=functools.partial(jax.lax.ragged_all_to_all, **how),
    )
    if not check:
        return received
    return jnp.where(_is_whole(x, received, there, back, level), received, jnp.nan)


def _forward(x, *args):
    numbers = args[:6]
    return _exchange(x, *args), (numbers, x.shape[0])


def _backward(num_rows, level, check, residue, dy):
    del num_rows
    numbers, num_sent = residue
    # What came as slices of the buffer goes back to the rows that it was.
    dx = _exchange(dy, *numbers[3:], *numbers[:3], num_sent, level, check)
    return dx, *(None for _ in numbers)


_exchange.defvjp(_forward, _backward)


def twin(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
    axis_index_groups=None,
) -> jax.Array:
    """Returns what `jax.lax.ragged_all_to_all` returns, for platforms that do not have it.

    All rows of all devices are gathered, and each device takes its own: n R rows are received.
    """
    # The receiver knows as much: `recv_sizes`.
    del send_sizes

    def transposed(z_S: jax.Array) -> jax.Array:
        """Returns, for each slice that arrives, what its sender says of it."""
        return jax.lax.all_to_all(
            z_S, axis_name, 0, 0, tiled=True, axis_index_groups=axis_index_groups
        )

    num_sent = operand.shape[0]
    gathered = jax.lax.all_gather(
        operand, axis_name, axis=0, tiled=True, axis_index_groups=axis_index_groups
    )
    # The slices that arrive, by their senders: where they begin among the gathered rows.
    num_slices = recv_sizes.shape[0]
    per_device = num_slices * num_sent // gathered.shape[0]
    sender_S = jnp.arange(num_slices, dtype=jnp.int32) // per_device
    start_S = sender_S * num_sent + transposed(input_offsets)
    target_S = transposed(output_offsets)
    slice_Q, is_filled_Q = slice_of_row(target_S, recv_sizes, output.shape[0])
    row_Q = jnp.arange(output.shape[0], dtype=jnp.int32)
    # The place of a row in its slice is the same on both sides.
    source_Q = row_Q - target_S[slice_Q] + start_S[slice_Q]
    # One behind the last row reads nothing.
    source_Q = jnp.where(is_filled_Q, source_Q, gathered.shape[0])
    arrived = gathered.at[source_Q].get(mode="fill", fill_value=0)
    return jnp.where(_beside(is_filled_Q, arrived), arrived, output)


def slice_of_row(
    start_S: jax.Array, size_S: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the slice that each row lies in, [num_rows], and whether it lies in one."""
    row_Q1 = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    is_inside_QS = (row_Q1 >= start_S[None]) & (row_Q1 < (start_S + size_S)[None])
    # The first True of each row; slices do not overlap, so there is one at most.
    return jnp.argmax(is_inside_QS, axis=1).astype(jnp.int32), is_inside_QS.any(1)


def _is_whole(
    sent: jax.Array, received: jax.Array, there: Slices, back: Slices, level: Level
) -> jax.Array:
    """Returns whether the bits that arrived in the devices of a group are those that were sent.

    Each row counts by its place in the buffers of all receivers, so that a row which comes to lie
    elsewhere is found too.
    """
    num_rows = received.shape[0]
    slice_R, is_sent_R = slice_of_row(there.start_S, there.size_S, sent.shape[0])
    row_R = jnp.arange(sent.shape[0], dtype=jnp.int32)
    target_R = row_R - there.start_S[slice_R] + there.target_S[slice_R]
    receiver_R = slice_R // (there.size_S.shape[0] // level.size)
    place_R = receiver_R * num_rows + target_R
    _, is_filled_Q = slice_of_row(back.start_S, back.size_S, num_rows)
    place_Q = level.place().astype(jnp.int32) * num_rows + jnp.arange(num_rows, dtype=jnp.int32)
    sums_2 = jnp.stack([_bits(sent, place_R, is_sent_R), _bits(received, place_Q, is_filled_Q)])
    # A sum over the axis has no groups; these are two numbers of each device.
    sums_n2 = jax.lax.all_gather(sums_2, "expert", axis_index_groups=level.groups)
    total_2 = sums_n2.sum(0, dtype=jnp.uint32)
    return total_2[0] == total_2[1]


def _bits(x: jax.Array, place_R: jax.Array, counts_R: jax.Array) -> jax.Array:
    """Returns the sum of the bits of rows as whole numbers, modulo 2^32, by their places."""
    width = min(32, 8 * x.dtype.itemsize)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    # An axis for what one number of 64 bits becomes, and for rows without columns.
    per_row = math.prod(words.shape[1:])
    word_R = words.reshape(x.shape[0], per_row).sum(1, dtype=jnp.uint32)
    # Odd, so that no bit is lost.
    weight_R = place_R.astype(jnp.uint32) * jnp.uint32(2) + jnp.uint32(1)
    return jnp.where(counts_R, word_R * weight_R, 0).sum(dtype=jnp.uint32)


def _beside(is_true_R: jax.Array, x: jax.Array) -> jax.Array:
    """Returns a condition on rows in the shape of rows, [R, 1, ...]."""
    return is_true_R.reshape(-1, *(1 for _ in x.shape[1:]))
