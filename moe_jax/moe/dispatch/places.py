"""Buffers in which every expert has equally many places: sent over the expert axis, computed, sent
back. For capacity and slots.

Shapes: n devices of the expert axis, E experts, e of this device, R rows; "places" are the rows of
one expert on one device.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe.dispatch.contract import Experts
from moe_jax.moe.dispatch.exchange import SAVED, all_to_all
from moe_jax.moe.dispatch.layout import Shape, round_up
from moe_jax.moe.experts.blocks import block_sizes


def through_experts(
    x_RD: jax.Array,
    gate_R: jax.Array,
    experts: Experts,
    shape: Shape,
    filled_E: jax.Array | None = None,
) -> jax.Array:
    """Returns the results of experts for rows [E * places, D] in order of expert.

    They have the same order, and are weighted by `gate_R`. `filled_E`: how many rows of each expert
    are filled, where these come first; None = all.
    """
    with jax.named_scope("dispatch"):
        x_RD = checkpoint_name(_send(x_RD, shape), SAVED)
        gate_R = _send(gate_R, shape)
    # What several devices have sent for an expert has gaps.
    filled_e = filled_E if shape.expert_axis == 1 else None
    y_RD = _on_padded_rows(x_RD, gate_R, experts, shape, filled_e)
    with jax.named_scope("combine"):
        return _return(y_RD, shape)


def _on_padded_rows(
    x_RD: jax.Array,
    gate_R: jax.Array,
    experts: Experts,
    shape: Shape,
    filled_e: jax.Array | None,
) -> jax.Array:
    """Returns the results of rows of which every local expert has equally many, of which the first
    are filled.
    """
    e = shape.local_experts
    # n * places: what all n devices sent for one expert.
    rows_of_expert = x_RD.shape[0] // e
    block = block_sizes(rows_of_expert)
    # The grouped product works in blocks, so the rows of an expert are padded to whole ones.
    room = round_up(rows_of_expert, block[1])
    padding = room - rows_of_expert

    def pad(z_RX: jax.Array) -> jax.Array:
        z_erX = z_RX.reshape((e, rows_of_expert) + z_RX.shape[1:])
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (z_RX.ndim - 1)
        return jnp.pad(z_erX, widths).reshape((e * room,) + z_RX.shape[1:])

    # The room of expert i begins at i * room; only its first rows are real.
    start_e = jnp.arange(e, dtype=jnp.int32) * room
    size_e = jnp.full((e,), rows_of_expert, jnp.int32) if filled_e is None else filled_e
    y_RD = experts.grouped(pad(x_RD), pad(gate_R), start_e, size_e, block)
    y_erD = y_RD.reshape(e, room, -1)[:, :rows_of_expert]
    return y_erD.reshape(x_RD.shape[0], -1)


def _send(x: jax.Array, shape: Shape) -> jax.Array:
    """Returns the rows of the local experts, from all n devices of the expert axis.

    [E * places, ...] in order of expert -> [e * (n * places), ...].
    """
    n, e = shape.expert_axis, shape.local_experts
    # Part i of the n parts holds the rows for the experts of device i.
    x_ne = x.reshape((n, e, -1) + x.shape[1:])
    # What came from one device is for all local experts: the experts become the outer dimension.
    x_en = jnp.moveaxis(all_to_all(x_ne, "expert"), 0, 1)
    return x_en.reshape((-1,) + x.shape[1:])


def _return(y_RD: jax.Array, shape: Shape) -> jax.Array:
    """Returns the rows to the devices that they came from: the inverse of `_send`."""
    n, e = shape.expert_axis, shape.local_experts
    d_model = y_RD.shape[-1]
    y_neD = jnp.moveaxis(y_RD.reshape(e, n, -1, d_model), 1, 0)
    return all_to_all(y_neD, "expert").reshape(-1, d_model)
