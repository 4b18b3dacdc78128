"""What SET and RigL share: at constant density some groups go, and as many come."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe.sparse.patterns.contract import Matrices, Shaped
from moe_jax.moe.sparse.rules.contract import Kept, Now, span


def regrowth_due(now: Now, options: Any) -> jax.Array:
    return (now.step < span(now, 0.0, options.end)[1]) & (now.step % options.every == 0)


def regrow(
    experts: Matrices, masks: Kept, growth: Kept, shape: Shaped, fraction: jax.Array
) -> Kept:
    """Replaces groups at constant density: of the k live groups of every row the `fraction` k of
    the least magnitude go, and as many come with the largest `growth`.

    Those that just went may come back, as in the paper of RigL (algorithm 1); they keep their value
    then. All others come at 0.
    """
    live = {
        key: z > 0
        for key, z in shape.pool({n: m.astype(jnp.float32) for n, m in masks.items()}).items()
    }

    def leave(z):
        return jnp.round(fraction * shape.kept(z)).astype(jnp.int32)

    magnitude = {key: jnp.where(live[key], z, -1) for key, z in shape.norms(experts).items()}
    stay = shape.choose(magnitude, lambda z: shape.kept(z) - leave(z))
    growth = {key: jnp.where(stay[key], -1, growth[key]) for key in stay}
    grown = shape.choose(growth, leave)
    return shape.spread({key: stay[key] | grown[key] for key in stay}, experts)
