"""Rows whose tokens are split over the mesh axis `seq` (context parallelism), and their order.

A row of S tokens is cut into 2 n chunks, n the length of the axis. Device i has two of them, chunk
2 i and chunk 2 n - 1 - 2 i. A causal query sees all earlier keys, so a chunk costs as much as its
number; the two of a device add up to 2 n - 1, the same for all (the idea of Brandon et al. 2023,
Striped Attention, arXiv:2311.09431, with the chunks of Llama 3, arXiv:2407.21783, section 3.3.2).
Against plain halves of neighbours, chunks 2 i and 2 i + 1, only the second one has another device:
that of i and n - 1 - i are exchanged.

Three orders of a row's tokens occur:

    natural   whole rows, as the batch has them; every device of the axis has all
    own       the two chunks of each device; between the first block and the last one
    in turn   chunks 2 i and 2 i + 1 of each device; after the last block, for the loss

Shapes: B rows, S tokens of a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moe_jax.parallel.mesh import BATCH, P

AXIS = "seq"
# Chunks of a row that a device has.
CHUNKS = 2


def length() -> int:
    """Returns the number of devices that share a row; 1 where there is no mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def is_split(x_BS: Array) -> bool:
    """Returns whether the tokens of rows are split over the axis, outside of a shard_map."""
    partition = jax.typeof(x_BS).sharding.spec
    return length() > 1 and len(partition) > 1 and partition[1] == AXIS


def tokens_spec(x_BS: Array, *others: str | None) -> P:
    """Returns the partition of an array of the same tokens with `others` as further dimensions."""
    return P(BATCH, AXIS if is_split(x_BS) else None, *others)


def enter(z_BS: Any) -> Any:
    """Returns arrays of whole rows [B, S, ...] split over the axis, in the order of its own.

    Nothing travels. They stay whole where the axis is of length one, or does not divide the row.
    """

    def one(z_BS: Array) -> Array:
        # A row of features has another length than the row of tokens.
        if length() == 1 or z_BS.shape[1] % (CHUNKS * length()):
            return z_BS
        return jax.shard_map(own, in_specs=P(BATCH), out_specs=P(BATCH, AXIS))(z_BS)

    return jax.tree.map(one, z_BS)


def leave(x_BSD: Array) -> Array:
    """Returns tokens in the order of `enter` in turn: half of them change places."""
    if not is_split(x_BSD):
        return x_BSD

    def on_device(x_BTD: Array) -> Array:
        first, second = jnp.split(x_BTD, CHUNKS, axis=1)
        n = lax.axis_size(AXIS)
        # The first chunks stay where they are.
        second = lax.ppermute(second, AXIS, [(i, n - 1 - i) for i in range(n)])
        return jnp.concatenate([first, second], axis=1)

    run = jax.shard_map(on_device, in_specs=P(BATCH, AXIS), out_specs=P(BATCH, AXIS))
    with jax.named_scope("order_rows"):
        return run(x_BSD)


def whole(z_BS: Array) -> Array:
    """Returns tokens that are split in turn as whole rows on every device."""
    if not is_split(z_BS):
        return z_BS
    with jax.named_scope("order_rows"):
        return jax.sharding.reshard(z_BS, P(BATCH))


# Inside of a shard_map.


def own(z_BS: Array) -> Array:
    """Returns the tokens of this device, of whole rows."""
    n, i = lax.axis_size(AXIS), lax.axis_index(AXIS)
    chunk = z_BS.shape[1] // (CHUNKS * n)
    # Chunk 2 i, and chunk 2 n - 1 - 2 i.
    first = lax.dynamic_slice_in_dim(z_BS, 2 * i * chunk, chunk, axis=1)
    second = lax.dynamic_slice_in_dim(z_BS, (2 * n - 1 - 2 * i) * chunk, chunk, axis=1)
    return jnp.concatenate([first, second], axis=1)


def reordered(z_BS: Array, n: int) -> Array:
    """Returns whole rows in natural order, of the tokens of all devices one after another; and
    back, for it is its own inverse.
    """
    pairs = z_BS.reshape(z_BS.shape[0], n, CHUNKS, -1, *z_BS.shape[2:])
    # The first chunks are 0, 2, 4, ..; the second ones 2 n - 1, 2 n - 3, ..
    first, second = pairs[:, :, 0], pairs[:, ::-1, 1]
    return jnp.stack([first, second], axis=2).reshape(z_BS.shape)


def places(n: int, row_length: int) -> np.ndarray:
    """Returns where in its row each token of each device stands, int32 [n, S / n]."""
    place_1S = np.arange(row_length, dtype=np.int32).reshape(1, n, CHUNKS, -1)
    pairs = np.stack([place_1S[:, :, 0], place_1S[:, ::-1, 1]], axis=2)
    return pairs.reshape(n, -1)
