"""What an MoE layer does where the tokens of a row are split over the mesh axis `seq`
(parallel/context.py).

A group of the router is of whole rows, so their tokens are gathered first. The devices of `seq`
route them alike, each computes experts of its own, and a reduce-scatter gives each its own tokens
back. All of it is inside of the layer's shard_map.

Shapes: see layer.py; n devices of `expert`, m of `seq`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch.exchange import all_gather, reduce_scatter
from moe_jax.moe.routing.contract import Routing, Slots
from moe_jax.parallel import context


def whole_rows(x_BTD: jax.Array) -> jax.Array:
    """Returns the tokens of whole rows, of those of this device: a group is of whole rows."""
    with jax.named_scope("dispatch"):
        in_turn = all_gather(x_BTD, context.AXIS, 1)
        return context.reordered(in_turn, jax.lax.axis_size(context.AXIS))


def summed(y_BSD: jax.Array, split: bool) -> jax.Array:
    """Returns the sum over what devices of `model` and `seq` have computed of the same tokens.

    Those of `model` have each their share of the hidden columns, those of `seq` their experts.
    `split`: of the sum a device of `seq` keeps its own tokens.
    """
    if not split:
        return jax.lax.psum(y_BSD, ("model", context.AXIS))
    in_turn = context.reordered(y_BSD, jax.lax.axis_size(context.AXIS))
    return jax.lax.psum(reduce_scatter(in_turn, context.AXIS, 1), "model")


def said_once(sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns what every device of `seq` has computed of the same whole rows, as one array.

    It is the first device's: a sum of all would be a multiple, and so would its gradient.
    """
    is_first = jax.lax.axis_index(context.AXIS) == 0

    def one(z: jax.Array) -> jax.Array:
        # Booleans have no sum.
        number = z.astype(jnp.int32) if z.dtype == bool else z
        return jax.lax.psum(jnp.where(is_first, number, 0), context.AXIS).astype(z.dtype)

    return {name: one(z) for name, z in sums.items()}


def of_own_experts(routing: Routing | Slots, num_experts: int) -> Routing | Slots:
    """Returns what a routing sends to the experts that devices with this place in `seq` have.

    Experts are split over `expert`, and those of each part over `seq`: device (i, j) of n x m has
    the part i m + j of them. The others are left out, and these are numbered without them, as the
    experts of an axis `expert` alone; "nowhere" is behind the last of them, as ever.
    """
    n, m = jax.lax.axis_size("expert"), jax.lax.axis_size(context.AXIS)
    mine, each = jax.lax.axis_index(context.AXIS), num_experts // (n * m)
    if isinstance(routing, Slots):

        def own(z_GtEp: jax.Array) -> jax.Array:
            G, t, _, p = z_GtEp.shape
            z_Gtnmep = z_GtEp.reshape(G, t, n, m, each, p)
            part = jax.lax.dynamic_index_in_dim(z_Gtnmep, mine, 3, keepdims=False)
            return part.reshape(G, t, n * each, p)

        combine_GtEp, dispatch_GtEp = own(routing.combine_GtEp), own(routing.dispatch_GtEp)
        return routing._replace(combine_GtEp=combine_GtEp, dispatch_GtEp=dispatch_GtEp)
    part_N, place_N = jnp.divmod(routing.expert_index_N, each)
    is_own_N = (routing.expert_index_N < num_experts) & (part_N % m == mine)
    own_N = jnp.where(is_own_N, part_N // m * each + place_N, n * each)
    return routing._replace(
        expert_index_N=own_N.astype(routing.expert_index_N.dtype),
        gate_N=jnp.where(is_own_N, routing.gate_N, 0),
    )
