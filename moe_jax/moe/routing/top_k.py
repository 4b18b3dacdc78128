"""Token-choice top-k (Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5; softmax before the selection
as in Mixtral and OLMoE).

    softmax = "before":  p = softmax(x W);  the k largest p;
                         gates p / sum(p) if renormalize, else p
    softmax = "after":   the k largest logits;  gates = softmax over those k
                         (equal to "before" with renormalize, up to rounding)

Ties go to the expert with the lower index. Gates are multiplied by `scale`.
"""

import dataclasses

import jax

from moe_jax.moe.routing.contract import (
    Arrays,
    Declared,
    Router,
    RouterCfg,
    Routing,
    Tokens,
    router_logits,
    sees_nothing,
    statistics,
    token_choice,
)
from moe_jax.schema.options import NUMBER, POSITIVE, option


@dataclasses.dataclass(frozen=True)
class Options:
    k: int = option(2, "experts per token", NUMBER)
    softmax: str = option(
        "before", '"before" or "after" the selection', choices=("before", "after")
    )
    renormalize: bool = option(True, 'gates of a token sum to 1 (softmax "after" always does)')
    scale: float = option(1.0, "factor on the gates", POSITIVE)


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Assignments token by token, a token's choices in order of falling gate."""
    del state, rng, train
    logits_TE = router_logits(tokens.x_TD, params["gate"])
    expert_TK, gate_TK = select(logits_TE, cfg.options)
    sums = statistics(logits_TE, expert_TK, gate_TK, tokens)
    return token_choice(expert_TK, gate_TK, sums, tokens, cfg.num_experts)


def select(logits_TE: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """(experts [T, K], gates [T, K]) by options k, softmax, renormalize and scale."""
    if options.softmax == "after":
        top_TK, expert_TK = jax.lax.top_k(logits_TE, options.k)
        gate_TK = jax.nn.softmax(top_TK)
    else:
        gate_TK, expert_TK = jax.lax.top_k(jax.nn.softmax(logits_TE), options.k)
        if options.renormalize:
            gate_TK = gate_TK / gate_TK.sum(-1, keepdims=True)
    return expert_TK, gate_TK * options.scale


def declared(num_experts: int, options: Options) -> Declared:
    del num_experts
    one = options.renormalize or options.softmax == "after"
    return Declared(most=options.k, exact=True, gate_sum=options.scale if one else None)


ROUTER = Router(Options, route, sees_nothing, declared)
