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
    times_k,
)
from moe_jax.moe.routing.sigmoid import (
    SCORES,
    bias_state,
    biased,
    declared,
    from_affinities,
    score,
    silenced,
)
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
    """Returns assignments token by token, a token's choices in order of falling biased score."""
    del rng, train
    k = cfg.options.k
    router_logits_TE = router_logits(tokens.x_TD, params["gate"])
    affinity_TE = SCORES[cfg.options.score](router_logits_TE)
    biased_TE = biased(router_logits_TE, affinity_TE, state)
    # One more than is served: the last of them is the threshold that an expert must pass.
    top_TK, expert_index_TK = jax.lax.top_k(biased_TE, min(k + 1, cfg.num_experts))
    routing = from_affinities(router_logits_TE, affinity_TE, expert_index_TK[:, :k], tokens, cfg)
    # r_te of the header. With k = E there is no (k + 1)-th: the bias does nothing.
    required_bias_TE = top_TK[:, -1:] - jax.lax.stop_gradient(affinity_TE)
    bias_E = state["bias"].astype(affinity_TE.dtype)
    histogram = _histogram(required_bias_TE, bias_E, tokens, cfg.options.bins)
    return routing._replace(sums={**routing.sums, "histogram": histogram})


def _histogram(
    required_bias_TE: jax.Array, bias_E: jax.Array, tokens: Tokens, bins: int
) -> jax.Array:
    """Returns how many valid tokens of a row have their r in each bin: [b, E * bins]."""
    num_tokens, num_experts = required_bias_TE.shape
    row_length = num_tokens // tokens.num_rows
    low, width = _range(bias_E, bins)
    bin_TE = jnp.floor((required_bias_TE - low) / width).astype(jnp.int32)
    # r may be the upper end of the range, which belongs to the last bin.
    bin_TE = jnp.clip(bin_TE, 0, bins - 1)
    # One flat array of [row, expert, bin]: a scatter along one dimension is the cheapest.
    row_T = jnp.arange(num_tokens, dtype=jnp.int32) // row_length
    expert_E = jnp.arange(num_experts, dtype=jnp.int32)
    flat_index_TE = (row_T[:, None] * num_experts + expert_E[None]) * bins + bin_TE
    weight_TE = jnp.broadcast_to(tokens.valid_T[:, None], required_bias_TE.shape)
    weight_TE = weight_TE.astype(required_bias_TE.dtype)
    # `zeros_like` varies over the mesh as the scores do, which a scatter inside a shard_map needs.
    empty = jnp.zeros_like(required_bias_TE, shape=(tokens.num_rows * num_experts * bins,))
    counts = empty.at[flat_index_TE.reshape(-1)].add(weight_TE.reshape(-1))
    return counts.reshape(tokens.num_rows, -1)


def _range(bias_E: jax.Array, bins: int) -> tuple[jax.Array, jax.Array]:
    """Returns the lower end of the first bin, and the width of a bin."""
    low = bias_E.min() - 1
    high = bias_E.max() + 1
    return low, (high - low) / bins


def update(state: Arrays, totals: Arrays, cfg: RouterCfg) -> Arrays:
    """Returns the bias of a layer from the histogram of a step.

    A step without tokens changes nothing.
    """
    old_E = state["bias"]
    ema = cfg.options.ema
    histogram_EM = totals["histogram"].reshape(cfg.num_experts, cfg.options.bins)
    low, width = _range(old_E, cfg.options.bins)
    # A balanced expert serves k / E of all tokens.
    share = cfg.options.k / cfg.num_experts
    quantile_E = quantile(histogram_EM, share, low, width).astype(old_E.dtype)
    mixed_E = ema * old_E + (1 - ema) * quantile_E
    # A number that is added to every bias changes no choice.
    centred_E = mixed_E - mixed_E.mean()
    has_tokens = histogram_EM.sum() > 0
    return {"bias": jnp.where(has_tokens, centred_E, old_E)}


def quantile(histogram_EM: jax.Array, share: float, low: jax.Array, width: jax.Array) -> jax.Array:
    """Returns the value [E] that a share of each histogram [E, M bins] lies below.

    It is interpolated inside its bin.
    """
    num_bins = histogram_EM.shape[1]
    cumulative_EM = jnp.cumsum(histogram_EM, axis=1)
    target_E = share * cumulative_EM[:, -1]
    # The bins that end below the target; the quantile lies in the next one.
    is_before_EM = cumulative_EM < target_E[:, None]
    count_before_E = jnp.where(is_before_EM, histogram_EM, 0).sum(1)
    bin_E = jnp.minimum(is_before_EM.sum(1), num_bins - 1)
    bin_M = jnp.arange(num_bins, dtype=bin_E.dtype)
    is_bin_EM = bin_M[None] == bin_E[:, None]
    count_inside_E = jnp.where(is_bin_EM, histogram_EM, 0).sum(1)
    # Values are taken to lie evenly inside a bin.
    part_of_bin_E = (target_E - count_before_E) / jnp.maximum(count_inside_E, 1)
    position_E = bin_E.astype(part_of_bin_E.dtype) + part_of_bin_E
    return low + position_E * width


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
    multiplied=times_k,
    silenced=silenced,
)
