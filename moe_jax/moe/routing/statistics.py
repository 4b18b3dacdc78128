"""The sums per row that every load-balancing loss and every load metric is made of.

Shapes: T tokens of this device, b rows of it, K choices of a token, C classes that are counted (E
experts, or E + null experts).
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.routing.contract import RouterCfg, Routing, Tokens, token_choice
from moe_jax.precision import wide_dtype


def per_row(x_T: jax.Array, tokens: Tokens) -> jax.Array:
    """Sums a per-token statistic [T, ...] over the tokens of each row: [b, ...]."""
    return x_T.reshape((tokens.num_rows, -1) + x_T.shape[1:]).sum(1)


def one_hot(index_TK: jax.Array, num_classes: int) -> jax.Array:
    """Returns booleans [T, K, C]: whether choice k of token t is class c.

    A choice outside of [0, C) has no class.
    """
    class_C = jnp.arange(num_classes, dtype=index_TK.dtype)
    return index_TK[:, :, None] == class_C[None, None, :]


def statistics(
    router_logits_TC: jax.Array,
    expert_index_TK: jax.Array,
    gate_TK: jax.Array,
    tokens: Tokens,
    *,
    probs_TC: jax.Array | None = None,
    real_TK: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Returns the sums per row of a router that lists K choices for each token.

    Padding counts nowhere.

    Args:
      router_logits_TC: scores before any normalisation, for z = logsumexp(logits)^2.
      expert_index_TK: the chosen classes.
      gate_TK: their gates.
      probs_TC: what the router calls a token's distribution over classes; softmax(logits) unless
          given.
      real_TK: which choices exist, where a token may have fewer than K.

    Returns:
      counts [b, C] assignments; first [b, C] of them those that are a token's first choice; probs
      [b, C] of `probs_TC`, with a gradient; importance [b, C] of the gates, with a gradient
      (Shazeer et al. 2017, eq. 6); z, entropy (nats), gate (sum of a token's gates), gate_max,
      tokens: [b].
    """
    chosen_TKC = one_hot(expert_index_TK, router_logits_TC.shape[1])
    if real_TK is not None:
        chosen_TKC = chosen_TKC & real_TK[:, :, None]
    gate_TK1 = gate_TK.astype(router_logits_TC.dtype)[:, :, None]
    # A token chooses a class at most once, so the sum over K has one term.
    gate_TC = jnp.where(chosen_TKC, gate_TK1, 0).sum(1)
    return class_statistics(
        router_logits_TC,
        chosen_TKC.sum(1),
        gate_TC,
        tokens,
        probs_TC=probs_TC,
        # A router lists the best choice of a token first.
        first_TC=chosen_TKC[:, 0],
    )


def class_statistics(
    router_logits_TC: jax.Array,
    count_TC: jax.Array,
    gate_TC: jax.Array,
    tokens: Tokens,
    *,
    probs_TC: jax.Array | None = None,
    first_TC: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Returns what `statistics` does, for a router that has no list of choices for each token.

    Args:
      count_TC: whether, or how much, each class counts.
      gate_TC: its gate.
      first_TC: what counts as the first choice; unless given, the class with the largest gate
          where it counts.
    """
    wide = router_logits_TC.dtype
    valid_T = tokens.valid_T.astype(wide)
    if first_TC is None:
        # Where all gates are 0, argmax finds class 0, which counts for nothing: hence the mask.
        best_T1 = jnp.argmax(gate_TC, 1)[:, None]
        class_C = jnp.arange(gate_TC.shape[1], dtype=best_T1.dtype)
        first_TC = (best_T1 == class_C[None]) & count_TC.astype(bool)
    if probs_TC is None:
        probs_TC = jax.nn.softmax(router_logits_TC)
    # The entropy is that of a distribution, which the affinities of some routers are not.
    share_TC = probs_TC / jnp.maximum(probs_TC.sum(-1, keepdims=True), 1e-30)
    entropy_T = -(share_TC * jnp.log(jnp.maximum(share_TC, 1e-30))).sum(-1)
    # ST-MoE, eq. 5 (moe/losses/z.py).
    z_T = jax.nn.logsumexp(router_logits_TC, -1) ** 2

    def over_rows(x: jax.Array) -> jax.Array:
        """Sums [T] or [T, C] over the valid tokens of each row."""
        valid = valid_T.reshape((-1,) + (1,) * (x.ndim - 1))
        return per_row(x.astype(wide) * valid, tokens)

    # Gradients go through probs, importance and z alone: the others are counts, or are logged.
    stop = jax.lax.stop_gradient
    return {
        "counts": over_rows(stop(count_TC)),
        "first": over_rows(first_TC),
        "probs": over_rows(probs_TC),
        "importance": over_rows(gate_TC),
        "z": over_rows(z_T),
        "entropy": over_rows(stop(entropy_T)),
        "gate": over_rows(stop(gate_TC.sum(-1))),
        "gate_max": over_rows(stop(gate_TC.max(-1))),
        "tokens": per_row(valid_T, tokens),
    }


def even_routing(expert_index_TK: jax.Array, tokens: Tokens, cfg: RouterCfg) -> Routing:
    """Returns the Routing of a router without logits: every gate is 1 / K.

    Its probabilities are uniform.
    """
    wide = wide_dtype(tokens.x_TD.dtype)
    num_tokens, k = expert_index_TK.shape
    gate_TK = jnp.full((num_tokens, k), 1 / k, wide)
    zero_logits_TE = jnp.zeros((num_tokens, cfg.num_experts), wide)
    # The softmax of equal logits is the uniform distribution.
    sums = statistics(zero_logits_TE, expert_index_TK, gate_TK, tokens)
    # z of equal logits would be log(E)^2. A router without logits has none.
    sums["z"] = jnp.zeros_like(sums["z"])
    return token_choice(expert_index_TK, gate_TK, sums, tokens, cfg.num_experts)
