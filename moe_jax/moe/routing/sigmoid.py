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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    router_logits,
    sees_nothing,
    times_k,
    token_choice,
)
from moe_jax.moe.routing.statistics import one_hot, per_row, statistics
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
    """Declares a bias per expert [E] that starts at zero."""
    del options
    return {"bias": Weight((sizes.num_experts,), (None,), 0.0)}


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Returns assignments token by token, a token's choices in order of falling biased affinity."""
    del rng, train
    router_logits_TE = router_logits(tokens.x_TD, params["gate"])
    affinity_TE = SCORES[cfg.options.score](router_logits_TE)
    biased_TE = biased(router_logits_TE, affinity_TE, state)
    # Groups that are closed have -inf, so top_k takes none of their experts.
    open_TE = best_groups(biased_TE, cfg.options)
    _, expert_index_TK = jax.lax.top_k(open_TE, cfg.options.k)
    return from_affinities(router_logits_TE, affinity_TE, expert_index_TK, tokens, cfg)


def biased(router_logits_TE: jax.Array, affinity_TE: jax.Array, state: Arrays) -> jax.Array:
    """Returns affinity plus bias [T, E], which decides; no gradient goes through it.

    It is NEVER where an instrument bars an expert, whatever the bias.
    """
    bias_E = state["bias"].astype(affinity_TE.dtype)
    # The bias decides who is chosen, and never how much an output weighs.
    summed_TE = jax.lax.stop_gradient(affinity_TE) + bias_E[None]
    # A sigmoid turns the logit of a barred expert into 0, which a bias could lift.
    return jnp.where(router_logits_TE > NEVER / 2, summed_TE, NEVER)


def best_groups(biased_TE: jax.Array, options: Options) -> jax.Array:
    """Returns the biased affinities [T, E] with -inf outside of the `top_groups` best groups."""
    num_groups = options.num_groups
    if options.top_groups == num_groups:
        return biased_TE
    # G groups of e consecutive experts each; g of them are chosen.
    biased_TGe = biased_TE.reshape(biased_TE.shape[0], num_groups, -1)
    # A group of one expert has no second affinity.
    num_summed = min(2, biased_TGe.shape[-1]) if options.group_score == "top2" else 1
    best_of_group_TGn, _ = jax.lax.top_k(biased_TGe, num_summed)
    # [T, G]: of the biased affinities, as the choice of experts is.
    group_score_TG = best_of_group_TGn.sum(-1)
    _, group_index_Tg = jax.lax.top_k(group_score_TG, options.top_groups)
    is_open_TG = one_hot(group_index_Tg, num_groups).any(1)
    open_TGe = jnp.where(is_open_TG[:, :, None], biased_TGe, -jnp.inf)
    return open_TGe.reshape(biased_TE.shape)


def from_affinities(
    router_logits_TE: jax.Array,
    affinity_TE: jax.Array,
    expert_index_TK: jax.Array,
    tokens: Tokens,
    cfg: RouterCfg,
) -> Routing:
    """Returns the Routing of chosen experts; their gates are by options renormalize and scale."""
    gate_TK = jnp.take_along_axis(affinity_TE, expert_index_TK, axis=1)
    if cfg.options.renormalize:
        # Sigmoids of a token may all be 0, where softmax has a sum of 1.
        gate_TK = gate_TK / (gate_TK.sum(-1, keepdims=True) + 1e-20)
    gate_TK = gate_TK * cfg.options.scale
    # DeepSeek-V3, eq. 19: sigmoids do not sum to 1, and a balance loss wants shares.
    router_probs_TE = affinity_TE / (affinity_TE.sum(-1, keepdims=True) + 1e-20)
    sums = statistics(router_logits_TE, expert_index_TK, gate_TK, tokens, probs_TC=router_probs_TE)
    sums["unbiased"] = _unbiased_counts(affinity_TE, expert_index_TK.shape[1], tokens)
    return token_choice(expert_index_TK, gate_TK, sums, tokens, cfg.num_experts)


def _unbiased_counts(affinity_TE: jax.Array, k: int, tokens: Tokens) -> jax.Array:
    """Returns how often each expert is among the k largest affinities of a valid token [b, E]."""
    _, expert_index_TK = jax.lax.top_k(jax.lax.stop_gradient(affinity_TE), k)
    count_TE = one_hot(expert_index_TK, affinity_TE.shape[1]).sum(1).astype(affinity_TE.dtype)
    valid_T1 = tokens.valid_T[:, None].astype(affinity_TE.dtype)
    return per_row(count_TE * valid_T1, tokens)


def update(state: Arrays, totals: Arrays, cfg: RouterCfg) -> Arrays:
    """Returns the bias of a layer after a step.

    It goes up by bias_rate where the load was below the mean, and down where it was above.
    """
    # Of what the router chose, before any capacity.
    counts_E = totals["counts"]
    # Only the sign counts (algorithm 1): the step does not grow with the imbalance.
    direction_E = jnp.sign(counts_E.mean() - counts_E)
    change_E = cfg.options.bias_rate * direction_E
    return {"bias": state["bias"] + change_E.astype(state["bias"].dtype)}


def declared(num_experts: int, options: Any) -> Declared:
    del num_experts
    gate_sum = options.scale if options.renormalize else None
    return Declared(most=options.k, exact=True, gate_sum=gate_sum)


def normal_form(options: Options) -> Options:
    """Returns the options of the same routing at evaluation, when the bias stays: the rate is the
    default, and groups that are all open are one.
    """
    # At evaluation nothing moves the bias, so its rate makes no difference.
    same = dataclasses.replace(options, bias_rate=Options().bias_rate)
    if options.top_groups < options.num_groups:
        return same
    default = Options()
    return dataclasses.replace(
        same,
        num_groups=default.num_groups,
        top_groups=default.top_groups,
        group_score=default.group_score,
    )


def balanced_by(options: Options) -> str:
    """Names the bias, unless its rate is 0 (DeepSeek-V2)."""
    return "its bias" if options.bias_rate else ""


def score(options: Any) -> Callable[[jax.Array], jax.Array]:
    """Returns the function from logits to affinities."""
    return SCORES[options.score]


def renumbered(options: Options, index: Sequence[int], num_experts: int) -> str:
    """Returns why experts cannot get other numbers where groups of them are chosen."""
    num_groups = options.num_groups
    if options.top_groups == num_groups:
        return ""
    if len(index) % num_groups:
        return f"{len(index)} experts make no {num_groups} groups of one size"
    old_size, size = num_experts // num_groups, len(index) // num_groups
    groups = [{old // old_size for old in index[i : i + size]} for i in range(0, len(index), size)]
    whole = all(len(group) == 1 for group in groups)
    if whole and len(set.union(*groups)) == num_groups:
        return ""
    return f"experts of its {num_groups} groups would be mixed, and it chooses among whole groups"


def silenced(options: Any, state: Mapping[str, Any], new: np.ndarray) -> Any:
    """Returns the bias by which new experts are below all others, on the host; None for affinities
    that depend on the number of experts.
    """
    if options.score != "sigmoid" or getattr(options, "num_groups", 1) > 1:
        return None
    # Affinities lie between 0 and 1. The others' bias stays as it is.
    lowest = np.where(new, np.inf, state["bias"]).min() - 1.5
    return {**state, "bias": np.where(new, lowest, state["bias"])}


def refusals(options: Options, setting: Setting) -> Iterator[str]:
    """Refuses experts that make no whole groups, and too few of them for k choices."""
    at, num_experts = setting.at, setting.num_experts
    num_groups, top_groups = options.num_groups, options.top_groups
    group_size = num_experts // num_groups
    if num_experts % num_groups:
        yield (
            f"model.moe.num_experts ({num_experts}) must be divisible by {at}.num_groups "
            f"({num_groups})"
        )
    if top_groups > num_groups:
        yield (
            f"{at}.top_groups ({top_groups}) must lie between 1 and {at}.num_groups ({num_groups})"
        )
    num_open = top_groups * num_experts // num_groups
    if options.k > num_open:
        yield (
            f"{at}.k ({options.k}) must not exceed the {num_open} experts of "
            f"{at}.top_groups ({top_groups}) groups of {group_size}"
        )


ROUTER = Router(
    Options,
    route,
    sees_nothing,
    declared,
    state=bias_state,
    update=update,
    balanced_by=balanced_by,
    # DeepSeek-V3 keeps a small balance loss beside the bias.
    losses=("sequence_balance",),
    score=score,
    refusals=refusals,
    normal_form=normal_form,
    multiplied=times_k,
    renumbered=renumbered,
    silenced=silenced,
)
