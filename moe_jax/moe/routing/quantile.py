"""Quantile balancing: the bias of an expert is the quantile that would have given it its share of
the last batch.

Su, https://kexue.fm/archives/11619 (2026); the estimate over the whole batch from a histogram is
that of the Kimi K3 technical report (section 2.3.3, eq. 13-14, appendix D), as in Megatron-LM (pull
requests 5349 and 6637) and torchtitan (4577):

    s = sigmoid(x W);  the k largest s + bias;  gates from s without bias, as in sigmoid.py
    r_te = (k + 1)-th largest of s_t + bias, minus s_te
           a bias above it, and e is among the k + 1 best of token t
    bias_e <- the k / E quantile of r_te over the tokens t, then minus the mean over the experts

With that bias a share k / E of the tokens has s + bias above its own threshold, for every expert:
the load is even, without a rate to tune and without a loss. It is one step of an alternating
minimisation, so a few steps get there. `ema` keeps a part of the old bias.

Causal: a step routes with the bias of the steps before it. The sums are a histogram per row,
sums["histogram"] [b, E * bins], over [min(bias) - 1, max(bias) + 1], which holds every r because
scores lie in [0, 1]: counts, so they add up exactly over rows, devices and micro-batches. The
quantile is interpolated inside a bin, of which there are `bins`: Kimi K3 takes 1000; an activation
of b * E * bins numbers per layer is what more bins cost. Experts that take all tokens (k = E) have
no threshold: their bias does nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.routing.contract import (
    Arrays,
    Router,
    RouterCfg,
    Routing,
    Tokens,
    router_logits,
    sees_nothing,
)
from moe_jax.moe.routing.sigmoid import SCORES, bias_state, biased, declared, from_scores, score
from moe_jax.schema.options import BELOW_ONE, NUMBER, POSITIVE, at_least, option


@dataclasses.dataclass(frozen=True)
class Options:
    k: int = option(2, "experts per token", NUMBER)
    score: str = option("sigmoid", 'or "softmax"', choices=tuple(SCORES))
    renormalize: bool = option(True, "gates of a token sum to 1")
    scale: float = option(1.0, "factor on the gates", POSITIVE)
    bins: int = option(
        256, "of each expert's histogram, from which the quantile is interpolated", at_least(2)
    )
    ema: float = option(0.0, "share of the old bias that a step keeps", BELOW_ONE)


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Assignments token by token, a token's choices in order of falling biased score."""
    del rng, train
    k = cfg.options.k
    logits_TE = router_logits(tokens.x_TD, params["gate"])
    score_TE = SCORES[cfg.options.score](logits_TE)
    fixed_TE, bias_E = jax.lax.stop_gradient(score_TE), state["bias"].astype(score_TE.dtype)
    top_TK, expert_TK = jax.lax.top_k(
        biased(logits_TE, score_TE, state), min(k + 1, cfg.num_experts)
    )
    routing = from_scores(logits_TE, score_TE, expert_TK[:, :k], tokens, cfg)
    histogram = _histogram(top_TK[:, -1:] - fixed_TE, bias_E, tokens, cfg.options.bins)
    return routing._replace(sums={**routing.sums, "histogram": histogram})


def _histogram(required_TE: jax.Array, bias_E: jax.Array, tokens: Tokens, bins: int) -> jax.Array:
    """How many valid tokens of a row have their r in each bin: [b, E * bins]."""
    num_tokens, num_experts = required_TE.shape
    low, width = _range(bias_E, bins)
    bin_TE = jnp.clip(jnp.floor((required_TE - low) / width).astype(jnp.int32), 0, bins - 1)
    row_T1 = (jnp.arange(num_tokens) // (num_tokens // tokens.num_rows))[:, None]
    place_TE = (row_T1 * num_experts + jnp.arange(num_experts)[None]) * bins + bin_TE
    one_TE = jnp.broadcast_to(tokens.valid_T[:, None], required_TE.shape).astype(required_TE.dtype)
    empty = jnp.zeros_like(required_TE, shape=(tokens.num_rows * num_experts * bins,))
    return empty.at[place_TE.reshape(-1)].add(one_TE.reshape(-1)).reshape(tokens.num_rows, -1)


def _range(bias_E: jax.Array, bins: int) -> tuple[jax.Array, jax.Array]:
    """Lower end of the first bin, width of a bin."""
    low, high = bias_E.min() - 1, bias_E.max() + 1
    return low, (high - low) / bins


def update(state: Arrays, totals: Arrays, cfg: RouterCfg) -> Arrays:
    """The bias of a layer from the histogram of a step; a step without tokens changes nothing."""
    old_E, bins, ema = state["bias"], cfg.options.bins, cfg.options.ema
    histogram_EM = totals["histogram"].reshape(cfg.num_experts, bins)
    new_E = quantile(histogram_EM, cfg.options.k / cfg.num_experts, *_range(old_E, bins))
    new_E = ema * old_E + (1 - ema) * new_E.astype(old_E.dtype)
    return {"bias": jnp.where(histogram_EM.sum() > 0, new_E - new_E.mean(), old_E)}


def quantile(histogram_EM: jax.Array, share: float, low: jax.Array, width: jax.Array) -> jax.Array:
    """The value [E] that a share of each histogram [E, M bins] lies below, by interpolation inside
    its bin.
    """
    below_EM = jnp.cumsum(histogram_EM, axis=1)
    target_E1 = share * below_EM[:, -1:]
    full_EM = below_EM < target_E1
    before_E = jnp.where(full_EM, histogram_EM, 0).sum(1)
    bin_E = jnp.minimum(full_EM.sum(1), histogram_EM.shape[1] - 1)
    inside_E = jnp.where(
        jnp.arange(histogram_EM.shape[1])[None] == bin_E[:, None], histogram_EM, 0
    ).sum(1)
    return low + (bin_E + (target_E1[:, 0] - before_E) / jnp.maximum(inside_E, 1)) * width


def balanced_by(options: Options) -> str:
    """Names the bias."""
    del options
    return "its bias"


ROUTER = Router(
    Options,
    route,
    sees_nothing,
    declared,
    state=bias_state,
    update=update,
    balanced_by=balanced_by,
    score=score,
)
