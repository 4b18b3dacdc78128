"""ReMoE's L1 loss of the ReLU router (Wang et al. 2024, arXiv:2412.14711, section 3.3-3.4): sum_e
f_e P_e.

P_e = mean over valid tokens of ReLU(x W)_e. f_e = C / (k S) x tokens that e is active for, of S
valid ones (1 when balanced and k are active), or 1 for the plain L1 norm: `l1_load` / S. Its
coefficient is no constant but the router's state: `l1_weight` / S.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.losses.contract import Totals


def value(totals: Totals) -> jax.Array:
    """Returns the loss of each MoE layer, [L]."""
    tokens_L1 = jnp.maximum(totals["tokens"], 1)[:, None]
    load_LE = totals["l1_load"] / tokens_L1
    # The "probs" of ReLU routing are its gates, which are no distribution.
    mean_gate_LE = totals["probs"] / tokens_L1
    return (load_LE * mean_gate_LE).sum(-1)
