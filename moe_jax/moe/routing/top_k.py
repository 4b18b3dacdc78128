"""Token-choice top-k (Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5; softmax before the selection
as in Mixtral and OLMoE).

    softmax = "before":  p = softmax(x W);  the k largest p;
                         gates p / sum(p) if renormalize, else p
    softmax = "after":   the k largest logits;  gates = softmax over those k
                         (equal to "before" with renormalize, up to rounding)

Ties go to the expert with the lower index. Gates are multiplied by `scale`. With `bias` the logits
are x W + b (gpt-oss, arXiv:2508.10925).
"""

import dataclasses

import jax

from moe_jax.moe.routing.contract import (
    Arrays,
    Declared,
    Router,
    RouterCfg,
    Routing,
    Sizes,
    Tokens,
    linear_gate,
    router_logits,
    sees_nothing,
    times_k,
    token_choice,
)
from moe_jax.moe.routing.statistics import statistics
from moe_jax.schema.options import NUMBER, POSITIVE, option
from moe_jax.weights import Weight


@dataclasses.dataclass(frozen=True)
class Options:
    k: int = option(2, "experts per token", NUMBER)
    softmax: str = option(
        "before", '"before" or "after" the selection', choices=("before", "after")
    )
    renormalize: bool = option(True, 'gates of a token sum to 1 (softmax "after" always does)')
    scale: float = option(1.0, "factor on the gates", POSITIVE)
    bias: bool = option(False, "a learned bias of the logits, one number for each expert")


def params(sizes: Sizes, options: Options) -> dict[str, Weight]:
    """Declares the gate [D, E], and a bias [E] that begins at zero."""
    weights = linear_gate(sizes, options)
    if options.bias:
        weights["gate_bias"] = Weight((sizes.num_experts,), (None,), 0.0)
    return weights


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Returns assignments token by token, a token's choices in order of falling gate."""
    del state, rng, train
    router_logits_TE = router_logits(tokens.x_TD, params["gate"])
    if cfg.options.bias:
        router_logits_TE = (
            router_logits_TE + params["gate_bias"].astype(router_logits_TE.dtype)[None]
        )
    expert_index_TK, gate_TK = select(router_logits_TE, cfg.options)
    sums = statistics(router_logits_TE, expert_index_TK, gate_TK, tokens)
    return token_choice(expert_index_TK, gate_TK, sums, tokens, cfg.num_experts)


def select(router_logits_TE: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """Returns (expert_index [T, K], gates [T, K]) by options k, softmax, renormalize and scale."""
    if options.softmax == "after":
        # top_k is stable: of equal logits the lower index comes first.
        top_logits_TK, expert_index_TK = jax.lax.top_k(router_logits_TE, options.k)
        gate_TK = jax.nn.softmax(top_logits_TK)
    else:
        router_probs_TE = jax.nn.softmax(router_logits_TE)
        # The softmax over all E, so gates tell how sure the router is, unless they are
        # renormalised.
        gate_TK, expert_index_TK = jax.lax.top_k(router_probs_TE, options.k)
        if options.renormalize:
            gate_TK = renormalized(gate_TK)
    # The scale is the last factor, so the gates of a token sum to it.
    return expert_index_TK, gate_TK * options.scale


def renormalized(gate_TK: jax.Array) -> jax.Array:
    """Returns the gates of each token divided by their sum."""
    return gate_TK / gate_TK.sum(-1, keepdims=True)


def declared(num_experts: int, options: Options) -> Declared:
    del num_experts
    # A softmax over the chosen logits sums to 1 by itself.
    sums_to_scale = options.renormalize or options.softmax == "after"
    return Declared(most=options.k, exact=True, gate_sum=options.scale if sums_to_scale else None)


def normal_form(options: Options) -> Options:
    """Returns the options with softmax = "before": "after" is that with renormalize."""
    if options.softmax == "before":
        return options
    return dataclasses.replace(options, softmax="before", renormalize=True)


ROUTER = Router(
    Options,
    route,
    sees_nothing,
    declared,
    params=params,
    normal_form=normal_form,
    multiplied=times_k,
)
