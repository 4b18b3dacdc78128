"""Token-choice top-k (Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5; softmax before the selection as in Mixtral and OLMoE).

    softmax = "before":  p = softmax(x W);  the k largest p;  gates p / sum(p) if renormalize, else p
    softmax = "after":   the k largest logits;  gates = softmax over those k   (equal to "before" with renormalize, up to rounding)

Ties go to the expert with the lower index. Gates are multiplied by `scale`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe.routing.contract import RouterCfg, Routing, Tokens, statistics
from moe_jax.weights import Weight


def params(d_model: int, num_experts: int, options: Mapping[str, Any]) -> dict[str, Weight]:
    del options
    return {"gate": Weight((d_model, num_experts), ("embed", None), d_model**-0.5)}


def state(d_model: int, num_experts: int, options: Mapping[str, Any]) -> dict[str, Weight]:
    del d_model, num_experts, options
    return {}


def route(
    params: Mapping[str, jax.Array],
    state: Mapping[str, jax.Array],
    tokens: Tokens,
    *,
    cfg: RouterCfg,
    rng: jax.Array,
    train: bool,
) -> Routing:
    """Assignments token by token, a token's choices in order of falling gate."""
    del state, rng, train
    options, k = cfg.options, cfg.options["k"]
    logits_TE = router_logits(tokens.x_TD, params["gate"])
    if options["softmax"] == "after":
        top_TK, expert_TK = jax.lax.top_k(logits_TE, k)
        gate_TK = jax.nn.softmax(top_TK)
    else:
        gate_TK, expert_TK = jax.lax.top_k(jax.nn.softmax(logits_TE), k)
        if options["renormalize"]:
            gate_TK = gate_TK / gate_TK.sum(-1, keepdims=True)
    gate_TK = gate_TK * options["scale"]
    valid_T1 = tokens.valid_T[:, None]
    return Routing(
        token_N=jnp.repeat(jnp.arange(expert_TK.shape[0], dtype=jnp.int32), k),
        expert_N=jnp.where(valid_T1, expert_TK, cfg.num_experts).reshape(-1).astype(jnp.int32),
        gate_N=jnp.where(valid_T1, gate_TK, 0).reshape(-1),
        sums=statistics(logits_TE, expert_TK, gate_TK, tokens),
        per_token=k,
    )


def router_logits(x_TD: jax.Array, gate_DE: jax.Array) -> jax.Array:
    """x W in at least float32, whatever the model computes in: rounding here moves tokens between experts."""
    wide = jnp.promote_types(x_TD.dtype, jnp.float32)
    return jnp.einsum("TD,DE->TE", x_TD.astype(wide), gate_DE.astype(wide), precision=jax.lax.Precision.HIGHEST)


def update(state: Mapping[str, jax.Array], totals: Mapping[str, jax.Array], cfg: RouterCfg) -> Mapping[str, jax.Array]:
    del totals, cfg
    return state
