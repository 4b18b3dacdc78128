"""What SET and RigL share: at constant density some groups go, and as many come."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe.sparse.patterns.contract import Matrices, Shaped
from moe_jax.moe.sparse.rules.contract import Kept, Now, span


def regrowth_due(now: Now, options: Any) -> jax.Array:
    """Returns whether masks change at this step: every so many, until the end."""
    _, end = span(now, 0.0, options.end)
    return (now.step < end) & (now.step % options.every == 0)


def regrow(
    experts: Matrices, masks: Kept, growth: Kept, shape: Shaped, fraction: jax.Array
) -> Kept:
    """Replaces groups at constant density.

    Of the k live groups of every row the `fraction` k of the least magnitude go, and as many come
    with the largest `growth`. Those that just went may come back, as in the paper of RigL
    (algorithm 1); they keep their value then. All others come at 0.
    """
    masks_as_numbers = {name: mask.astype(jnp.float32) for name, mask in masks.items()}
    is_live = {key: z > 0 for key, z in shape.pool(masks_as_numbers).items()}

    def num_replaced(groups: jax.Array) -> jax.Array:
        return jnp.round(fraction * shape.kept(groups)).astype(jnp.int32)

    def num_staying(groups: jax.Array) -> jax.Array:
        return shape.kept(groups) - num_replaced(groups)

    # -1 lies below every magnitude: what is not live cannot stay, what stays need not come.
    norms = shape.norms(experts)
    magnitude = {key: jnp.where(is_live[key], z, -1) for key, z in norms.items()}
    stays = shape.choose(magnitude, num_staying)
    candidates = {key: jnp.where(stays[key], -1, growth[key]) for key in stays}
    comes = shape.choose(candidates, num_replaced)
    return shape.spread({key: stays[key] | comes[key] for key in stays}, experts)
