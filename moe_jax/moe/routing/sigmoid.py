"""DeepSeek's router: affinities, a bias that balances without a loss, and a selection limited to
groups of experts.

DeepSeek-V3 (arXiv:2412.19437, eq. 12-16; DeepSeek-V2, arXiv:2405.04434, section 2.2.2, with
score="softmax", group_score="max", renormalize=False and bias_rate=0):

    s = sigmoid(x W)                            affinities; score="softmax": softmax(x W)
    the k largest s + bias                      inside the `top_groups` best of `num_groups` runs of
                                                E / num_groups experts
    gates = scale * s / sum of the chosen s     without the bias; renormalize=False: scale * s

The score of a group is the sum of its two largest biased affinities ("top2", the code of
DeepSeek-V3; the paper's K_r / M of them is 2 for its sizes) or the largest ("max", DeepSeek-V2).
Ties go to the lower index.

The bias is router state: after every optimizer step, bias += bias_rate * sign(mean load - load),
the load counted over the whole batch (Wang et al. 2024, arXiv:2408.15664, algorithm 1). bias_rate =
0 keeps it as it is. The probabilities that leave for a balance loss are s / sum(s) over all experts
(eq. 19); the sequence-wise loss counts the k largest s *without* the bias (eq. 18),
sums["unbiased"].
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe.routing.contract import (
    NEVER,
    Arrays,
    Declared,
    Router,
    RouterCfg,
    Routing,
    Setting,
    Sizes,
    Tokens,
    per_row,
    router_logits,
    sees_nothing,
    statistics,
    token_choice,
)
from moe_jax.schema.options import NOT_NEGATIVE, NUMBER, POSITIVE, option
from moe_jax.weights import Weight

SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}


@dataclasses.dataclass(frozen=True)
class Options:
    k: int = option(2, "experts per token", NUMBER)
    score: str = option(
        "sigmoid",
        'affinities: "sigmoid", or "softmax" as in DeepSeek-V2',
        choices=tuple(SCORES),
    )
    renormalize: bool = option(True, "gates of a token sum to scale")
    scale: float = option(1.0, "factor on the gates (routed scaling)", POSITIVE)
    bias_rate: float = option(
        0.001, "how far a step moves an expert's bias towards balance; 0 = never", NOT_NEGATIVE
    )
    num_groups: int = option(1, "groups of consecutive experts", NUMBER)
    top_groups: int = option(1, "groups that a token may choose from; num_groups = all", NUMBER)
    group_score: str = option(
        "top2",
        'of a group: sum of its two largest affinities, or "max", the largest',
        choices=("top2", "max"),
    )


def bias_state(sizes: Sizes, options: Any) -> dict[str, Weight]:
    """A bias per expert [E] that starts at zero."""
    del options
    return {"bias": Weight((sizes.num_experts,), (None,), 0.0)}


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Assignments token by token, a token's choices in order of falling biased affinity."""
    del rng, train
    logits_TE = router_logits(tokens.x_TD, params["gate"])
    score_TE = SCORES[cfg.options.score](logits_TE)
    biased_TE = biased(logits_TE, score_TE, state)
    _, expert_TK = jax.lax.top_k(best_groups(biased_TE, cfg.options), cfg.options.k)
    return from_scores(logits_TE, score_TE, expert_TK, tokens, cfg)


def biased(logits_TE: jax.Array, score_TE: jax.Array, state: Arrays) -> jax.Array:
    """Returns what decides, without a gradient: affinity plus bias, and NEVER where an instrument
    bars an expert, whatever its bias.
    """
    summed_TE = jax.lax.stop_gradient(score_TE) + state["bias"][None].astype(score_TE.dtype)
    return jnp.where(logits_TE > NEVER / 2, summed_TE, NEVER)


def best_groups(biased_TE: jax.Array, options: Options) -> jax.Array:
    """The biased affinities [T, E] with -inf at the experts of every group that is not among the
    `top_groups` best.
    """
    num_groups = options.num_groups
    if options.top_groups == num_groups:
        return biased_TE
    groups_TGe = biased_TE.reshape(biased_TE.shape[0], num_groups, -1)
    summed = min(2, groups_TGe.shape[-1]) if options.group_score == "top2" else 1
    score_TG = jax.lax.top_k(groups_TGe, summed)[0].sum(-1)
    _, best_Tg = jax.lax.top_k(score_TG, options.top_groups)
    open_TG = (best_Tg[:, :, None] == jnp.arange(num_groups)[None, None, :]).any(1)
    return jnp.where(open_TG[:, :, None], groups_TGe, -jnp.inf).reshape(biased_TE.shape)


def from_scores(
    logits_TE: jax.Array, score_TE: jax.Array, expert_TK: jax.Array, tokens: Tokens, cfg: RouterCfg
) -> Routing:
    """The Routing of chosen experts, with gates from their affinities (options renormalize and
    scale).
    """
    gate_TK = jnp.take_along_axis(score_TE, expert_TK, axis=1)
    if cfg.options.renormalize:
        gate_TK = gate_TK / (gate_TK.sum(-1, keepdims=True) + 1e-20)
    gate_TK = gate_TK * cfg.options.scale
    probs_TE = score_TE / (score_TE.sum(-1, keepdims=True) + 1e-20)
    sums = statistics(logits_TE, expert_TK, gate_TK, tokens, probs_TC=probs_TE)
    sums["unbiased"] = per_row(
        _hits(score_TE, expert_TK.shape[1]) * tokens.valid_T[:, None], tokens
    )
    return token_choice(expert_TK, gate_TK, sums, tokens, cfg.num_experts)


def _hits(score_TE: jax.Array, k: int) -> jax.Array:
    """1 for the k largest affinities of a token, else 0."""
    _, top_TK = jax.lax.top_k(jax.lax.stop_gradient(score_TE), k)
    return (
        (top_TK[:, :, None] == jnp.arange(score_TE.shape[1])[None, None, :])
        .sum(1)
        .astype(score_TE.dtype)
    )


def update(state: Arrays, totals: Arrays, cfg: RouterCfg) -> Arrays:
    """The bias of a layer after a step: up by bias_rate where the load was below the mean, down
    where it was above.
    """
    counts_E = totals["counts"]
    step_E = cfg.options.bias_rate * jnp.sign(counts_E.mean() - counts_E)
    return {"bias": state["bias"] + step_E.astype(state["bias"].dtype)}


def declared(num_experts: int, options: Any) -> Declared:
    del num_experts
    return Declared(
        most=options.k, exact=True, gate_sum=options.scale if options.renormalize else None
    )


def balanced_by(options: Options) -> str:
    """Names the bias, unless its rate is 0 (DeepSeek-V2)."""
    return "its bias" if options.bias_rate else ""


def score(options: Any) -> Callable[[jax.Array], jax.Array]:
    """Returns the function from logits to affinities."""
    return SCORES[options.score]


def refusals(options: Options, setting: Setting) -> Iterator[str]:
    """The experts must make whole groups, of which there are enough for k choices."""
    at, num_experts, num, top = (
        setting.at,
        setting.num_experts,
        options.num_groups,
        options.top_groups,
    )
    if num_experts % num:
        yield f"model.moe.num_experts ({num_experts}) must be divisible by {at}.num_groups ({num})"
    if top > num:
        yield f"{at}.top_groups ({top}) must lie between 1 and {at}.num_groups ({num})"
    if options.k > top * num_experts // num:
        yield (
            f"{at}.k ({options.k}) must not exceed the {top * num_experts // num} experts of "
            f"{at}.top_groups ({top}) groups of {num_experts // num}"
        )


ROUTER = Router(
    Options,
    route,
    sees_nothing,
    declared,
    state=bias_state,
    update=update,
    balanced_by=balanced_by,
    losses=("sequence_balance",),  # DeepSeek-V3 keeps a small one beside the bias
    score=score,
    refusals=refusals,
)
