"""Switch routing: one expert per token (Fedus et al. 2021, arXiv:2101.03961, eq. 1-2 with k = 1;
jitter in appendix C).

    p = softmax(x' W);  the expert with the largest p;  its gate is p itself, not renormalised, or
    the router would have no gradient

x' = x times uniform(1 - jitter, 1 + jitter), elementwise and in training only; the experts take x.
The draw is of the row and the place in it, the same on every mesh. Ties go to the expert with the
lower index. With `bias` the logits are x' W + b (`router_bias` in transformers). The published loss
is `balance` (eq. 4-6, moe/losses/balance.py).
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
    token_choice,
    uniform,
)
from moe_jax.moe.routing.statistics import statistics
from moe_jax.precision import wide_dtype
from moe_jax.schema.options import BELOW_ONE, option
from moe_jax.weights import Weight


@dataclasses.dataclass(frozen=True)
class Options:
    jitter: float = option(
        0.01, "training multiplies the router's input by uniform(1 - jitter, 1 + jitter)", BELOW_ONE
    )
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
    """Returns one assignment per token."""
    del state
    x_TD = tokens.x_TD
    if train and cfg.options.jitter:
        x_TD = jittered(tokens, cfg.options.jitter, rng)
    router_logits_TE = router_logits(x_TD, params["gate"])
    if cfg.options.bias:
        bias_E = params["gate_bias"].astype(router_logits_TE.dtype)
        router_logits_TE = router_logits_TE + bias_E[None]
    router_probs_TE = jax.nn.softmax(router_logits_TE)
    gate_T1, expert_index_T1 = jax.lax.top_k(router_probs_TE, 1)
    sums = statistics(router_logits_TE, expert_index_T1, gate_T1, tokens)
    return token_choice(expert_index_T1, gate_T1, sums, tokens, cfg.num_experts)


def jittered(tokens: Tokens, jitter: float, rng: jax.Array) -> jax.Array:
    """Returns x [T, D] in at least float32, times uniform(1 - jitter, 1 + jitter)."""
    # In bfloat16 a factor within 1/256 of 1 would be rounded away.
    x_TD = tokens.x_TD.astype(wide_dtype(tokens.x_TD.dtype))
    noise_TD = uniform(rng, tokens, x_TD.shape[1], x_TD.dtype)
    return x_TD * (1 - jitter + 2 * jitter * noise_TD)


def declared(num_experts: int, options: Options) -> Declared:
    del num_experts, options
    return Declared(most=1, exact=True, gate_sum=None)


def normal_form(options: Options) -> Options:
    """Returns the options without jitter, which is of training alone."""
    return dataclasses.replace(options, jitter=0.0)


ROUTER = Router(Options, route, sees_nothing, declared, params=params, normal_form=normal_form)
