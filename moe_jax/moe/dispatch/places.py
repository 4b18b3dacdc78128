"""Buffers in which every expert has equally many places: sent over the expert axis, computed, sent
back. For capacity and slots.

Shapes: n devices of the expert axis, E experts, e of this device, R rows; "places" are the rows of
one expert on one device.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch.exchange import all_to_all
from moe_jax.moe.dispatch.layout import Shape, round_up
from moe_jax.moe.experts.grouped_matmul import block_sizes


def through_experts(
    x_RD: jax.Array, gate_R: jax.Array, experts: Callable[..., jax.Array], shape: Shape
) -> jax.Array:
    """The results of experts for rows [E * places, D] in order of expert, in the same order;
    weighted by `gate_R`.
    """
    with jax.named_scope("dispatch"):
        x_RD, gate_R = _send(x_RD, shape), _send(gate_R, shape)
    y_RD = _on_padded_rows(x_RD, gate_R, experts, shape)
    with jax.named_scope("combine"):
        return _return(y_RD, shape)


def _on_padded_rows(
    x_RD: jax.Array, gate_R: jax.Array, experts: Callable[..., jax.Array], shape: Shape
) -> jax.Array:
    """Every local expert has equally many rows here; they are padded to the small block that the
    grouped product works in.
    """
    e = shape.num_experts // shape.expert_axis
    count = x_RD.shape[0] // e
    block = block_sizes(count)
    room = round_up(count, block[1])

    def pad(z):
        return jnp.pad(
            z.reshape((e, count) + z.shape[1:]),
            ((0, 0), (0, room - count)) + ((0, 0),) * (z.ndim - 1),
        )

    def flat(z):
        return z.reshape((-1,) + z.shape[2:])

    start_e = jnp.arange(e, dtype=jnp.int32) * room
    y_RD = experts(
        flat(pad(x_RD)), flat(pad(gate_R)), start_e, jnp.full((e,), count, jnp.int32), block
    )
    return flat(y_RD.reshape(e, room, -1)[:, :count])


def _send(x: jax.Array, shape: Shape) -> jax.Array:
    """[E * places, ...] in order of expert -> [e * (n * places), ...]: the rows of the local
    experts, from all n devices of the axis.
    """
    n, e = shape.expert_axis, shape.num_experts // shape.expert_axis
    x = x.reshape((n, e, -1) + x.shape[1:])
    return jnp.moveaxis(all_to_all(x, "expert"), 0, 1).reshape((-1,) + x.shape[3:])


def _return(y_RD: jax.Array, shape: Shape) -> jax.Array:
    """The inverse of `_send`."""
    n, e = shape.expert_axis, shape.num_experts // shape.expert_axis
    y = jnp.moveaxis(y_RD.reshape(e, n, -1, y_RD.shape[-1]), 1, 0)
    return all_to_all(y, "expert").reshape(-1, y_RD.shape[-1])
