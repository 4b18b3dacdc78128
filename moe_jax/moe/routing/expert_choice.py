"""Expert choice (Zhou et al. 2022, arXiv:2202.09368, section 3.2, eq. 1-3): experts choose tokens,
so the load is even by construction.

    S = softmax(x W) over the experts;  each expert takes the C tokens of a group with its largest
    S;  gates S C = ceil(factor * tokens of a group / E)

`factor` is the mean number of experts per token; a token may be taken by any number of experts, or
by none. Padding never takes a place: places that the valid tokens do not fill stay empty. C counts
padding among the tokens of a group, as the shapes do. Ties go to the earlier token. The capacity is
fixed here, so the dispatcher must not drop.

Whether a token is taken depends on every other token of its group: a causal model leaks, and cannot
be decoded token by token.
Shapes: G groups, t tokens of a group, C places of an expert in a group, n = E C assignments of a
group.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe_jax.moe.routing.contract import (
    Arrays,
    Declared,
    Router,
    RouterCfg,
    Routing,
    Sees,
    Setting,
    Tokens,
    class_statistics,
    router_logits,
)
from moe_jax.schema.options import POSITIVE, option


@dataclasses.dataclass(frozen=True)
class Options:
    factor: float = option(
        2.0,
        "experts per token on average: each takes ceil(factor * tokens / num_experts) of a group",
        POSITIVE,
    )


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """E C assignments of a group: group by group, expert by expert, in order of falling score."""
    del state, rng, train
    logits_TE = router_logits(tokens.x_TD, params["gate"])
    score_TE = jax.nn.softmax(logits_TE)
    num_tokens, num_experts = score_TE.shape
    num_groups = tokens.num_rows // cfg.group_rows
    group_tokens = num_tokens // num_groups
    open_TE = jnp.where(tokens.valid_T[:, None], jax.lax.stop_gradient(score_TE), -1)
    open_GEt = open_TE.reshape(num_groups, group_tokens, num_experts).swapaxes(1, 2)
    best_GEC, place_GEC = jax.lax.top_k(
        open_GEt, capacity(group_tokens, num_experts, cfg.options.factor)
    )
    first_G11 = (jnp.arange(num_groups, dtype=jnp.int32) * group_tokens)[:, None, None]
    expert_E1 = jnp.arange(num_experts, dtype=jnp.int32)[:, None]
    token_N = (place_GEC + first_G11).reshape(-1)
    expert_N = jnp.where(best_GEC < 0, num_experts, expert_E1[None]).reshape(-1)
    taken_TE = jnp.zeros_like(score_TE, dtype=bool).at[token_N, expert_N].set(True, mode="drop")
    return Routing(
        token_N=token_N,
        expert_N=expert_N,
        gate_N=score_TE.at[token_N, expert_N].get(mode="fill", fill_value=0),
        sums=class_statistics(logits_TE, taken_TE, jnp.where(taken_TE, score_TE, 0), tokens),
        per_token=0,
    )


def capacity(group_tokens: int, num_experts: int, factor: float) -> int:
    """C: the tokens that an expert takes of a group."""
    return max(1, min(math.ceil(factor * group_tokens / num_experts - 1e-9), group_tokens))


def sees(options: Options) -> Sees:
    del options
    return Sees(future=True, batch=False)


def declared(num_experts: int, options: Options) -> Declared:
    return Declared(most=num_experts, exact=False, gate_sum=None, average=options.factor)


def balanced_by(options: Options) -> str:
    """Names the capacity."""
    del options
    return "its capacity"


def refusals(options: Options, setting: Setting) -> Iterator[str]:
    """No token has more experts than there are."""
    if options.factor > setting.num_experts:
        yield (
            f"{setting.at}.factor = {options.factor} must be at most model.moe.num_experts "
            f"({setting.num_experts}): experts per token"
        )


ROUTER = Router(
    Options,
    route,
    sees,
    declared,
    own_capacity=True,
    balanced_by=balanced_by,
    refusals=refusals,
)
