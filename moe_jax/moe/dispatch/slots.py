"""Slots dispatch (soft MoE, Puigcerver et al. 2023, arXiv:2308.00951, eq. 1-2): experts work on
mixtures of the tokens of a group.

Every expert has p slots in each group; a slot is a weighted sum of the group's tokens, and a
token's output a weighted sum of the results of all slots. Nothing can be dropped. Mixtures are made
where their tokens are and travel by all-to-all, as capacity's places do.

Buffers per device: E G p rows sent, as many received and computed. Shapes: G groups of this device,
t tokens of a group, p slots.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch.contract import Dispatcher, Experts
from moe_jax.moe.dispatch.layout import Shape
from moe_jax.moe.dispatch.places import through_experts
from moe_jax.moe.routing.contract import Slots


@dataclasses.dataclass(frozen=True)
class Options:
    """There are none."""


def rows(shape: Shape, options: Options) -> int:
    """Returns the rows received and computed per device.

    These are all slots of the local experts, of all groups of the expert axis.
    """
    del options
    # Those of all experts, which devices of `seq` share.
    return shape.num_assignments // shape.seq_axis


def received(shape: Shape, options: Options) -> int:
    """Returns the rows that a device receives from others: all but its own part."""
    return rows(shape, options) * (shape.expert_axis - 1) // shape.expert_axis


def apply(
    x_TD: jax.Array,
    slots: Slots,
    experts: Experts,
    *,
    shape: Shape,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Returns (y_TD, dropped_N) as contract.py says; there are no assignments, so N is 0."""
    del options
    num_groups, group_tokens, num_experts, num_slots = slots.dispatch_GtEp.shape
    with jax.named_scope("dispatch"):
        x_GtD = x_TD.reshape(num_groups, group_tokens, -1)
        # The buffer is [E, G, p]: all rows of an expert lie together.
        x_EGpD = jnp.einsum("GtEp,GtD->EGpD", slots.dispatch_GtEp, x_GtD)
        x_RD = x_EGpD.reshape(-1, x_TD.shape[1])
        # The weights of the results are in `combine`.
        one_R = jnp.ones_like(x_RD, shape=x_RD.shape[:1])
    y_RD = through_experts(x_RD, one_R, experts, shape)
    with jax.named_scope("combine"):
        y_EGpD = y_RD.reshape(num_experts, num_groups, num_slots, -1)
        y_GtD = jnp.einsum("GtEp,EGpD->GtD", slots.combine_GtEp, y_EGpD)
    dropped_N = jnp.zeros_like(slots.dispatch_GtEp, shape=(0,), dtype=bool)
    return y_GtD.reshape(x_TD.shape), dropped_N


DISPATCHER = Dispatcher(Options, apply, rows, received, drops=False, mixes=True, exchanges=True)
