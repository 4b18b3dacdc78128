"""Routed experts that work in a narrower width L than the model's D (LatentMoE: Elango et al. 2026,
arXiv:2601.18089; it is in Nemotron 3 Super and Ultra, arXiv:2512.20856):

    z_t = x_t W_down                                          W_down [D, L]
    y_t = (sum over e of gate_te expert_e(z_t)) W_up          W_up [L, D]

All experts of a layer share both matrices. The router reads x_t, and so do shared experts. What
travels to the experts and back is z_t: its bytes fall by L / D, and so do the experts' weights and
their work.

Shapes: T tokens of a device, D model, L latent.
"""

import jax

from moe_jax.weights import Weight


def declare(d_model: int, latent_dim: int) -> dict[str, Weight]:
    """Declares both matrices; the last one of each expert has the small first values of what writes
    to the residual stream.
    """
    return {
        "down": Weight((d_model, latent_dim), ("embed", None), d_model**-0.5),
        "up": Weight((latent_dim, d_model), (None, "embed"), latent_dim**-0.5),
    }


def narrow(x_TD: jax.Array, latent: dict[str, jax.Array]) -> jax.Array:
    """Returns what the experts are given, z [T, L]; `latent` is {} where they have the model's
    width.
    """
    if not latent:
        return x_TD
    with jax.named_scope("latent"):
        return x_TD @ latent["down"]


def widen(y_BSL: jax.Array, latent: dict[str, jax.Array]) -> jax.Array:
    """Returns what the layer adds to the residual stream, of what the experts made together."""
    if not latent:
        return y_BSL
    with jax.named_scope("latent"):
        return y_BSL @ latent["up"]
