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
    router_logits,
)
from moe_jax.moe.routing.statistics import class_statistics
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
    """Returns E C assignments of a group.

    They come group by group, expert by expert, in order of falling score.
    """
    del state, rng, train
    router_logits_TE = router_logits(tokens.x_TD, params["gate"])
    router_probs_TE = jax.nn.softmax(router_logits_TE)
    num_tokens, num_experts = router_probs_TE.shape
    num_groups = tokens.num_rows // cfg.group_rows
    group_tokens = num_tokens // num_groups

    # Each expert takes the tokens with its largest scores. Padding scores less than any token.
    score_TE = jnp.where(tokens.valid_T[:, None], jax.lax.stop_gradient(router_probs_TE), -1)
    score_GEt = score_TE.reshape(num_groups, group_tokens, num_experts).swapaxes(1, 2)
    # C is static: it follows from shapes and options alone.
    num_places = capacity(group_tokens, num_experts, cfg.options.factor)
    top_score_GEC, token_in_group_GEC = jax.lax.top_k(score_GEt, num_places)

    # The list of assignments. A place that only padding was left for goes nowhere.
    first_token_G = jnp.arange(num_groups, dtype=jnp.int32) * group_tokens
    token_GEC = token_in_group_GEC + first_token_G[:, None, None]
    expert_E = jnp.arange(num_experts, dtype=jnp.int32)
    expert_index_GEC = jnp.where(top_score_GEC < 0, num_experts, expert_E[None, :, None])
    token_N = token_GEC.reshape(-1)
    expert_index_N = expert_index_GEC.reshape(-1)
    # The gates are read again, for the choice above had no gradient. Expert E is out of bounds: its
    # gate is 0.
    pair_N = (token_N, expert_index_N)
    gate_N = router_probs_TE.at[pair_N].get(mode="fill", fill_value=0)

    # A token has no list of K choices here, so the statistics are made of dense arrays [T, E].
    no_pair_TE = jnp.zeros_like(router_probs_TE, dtype=bool)
    is_taken_TE = no_pair_TE.at[pair_N].set(True, mode="drop")
    gate_TE = jnp.where(is_taken_TE, router_probs_TE, 0)
    sums = class_statistics(router_logits_TE, is_taken_TE, gate_TE, tokens)
    return Routing(token_N, expert_index_N, gate_N, sums, per_token=0)


def capacity(group_tokens: int, num_experts: int, factor: float) -> int:
    """Returns C: the tokens that an expert takes of a group."""
    # 1e-9, so that a product which is whole but for rounding is not rounded up.
    num_places = math.ceil(factor * group_tokens / num_experts - 1e-9)
    return max(1, min(num_places, group_tokens))


def sees(options: Options) -> Sees:
    del options
    return Sees(future=True, batch=False)


def declared(num_experts: int, options: Options) -> Declared:
    return Declared(most=num_experts, exact=False, gate_sum=None, average=options.factor)


def balanced_by(options: Options) -> str:
    """Names the capacity."""
    del options
    return "its capacity"


def multiplied(options: Options, n: int) -> Options:
    """Returns options by which each of n times as many experts takes as many tokens as before."""
    return dataclasses.replace(options, factor=n * options.factor)


def refusals(options: Options, setting: Setting) -> Iterator[str]:
    """Refuses more experts for a token than there are."""
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
    multiplied=multiplied,
)
