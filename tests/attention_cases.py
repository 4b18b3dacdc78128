"""What tests of attention share."""

import jax.numpy as jnp


def as_cache(k_BSGA, v_BSGA):
    """Returns keys [B, G, A, S] and values [B, G, S, A], as a cache has them."""
    return jnp.transpose(k_BSGA, (0, 2, 3, 1)), jnp.swapaxes(v_BSGA, 1, 2)
