"""Null experts that compute nothing: a token that needs less chooses less (AdaMoE, Zeng et al.
2024, arXiv:2406.13233; zero and copy experts of MoE++, Jin et al. 2024, arXiv:2410.07348, section
3.1).

    p = softmax(x W) over E + num_null classes;  the k largest;  classes E, E + 1, .. are null
    experts and go nowhere

    kind = "zero"        a null choice adds nothing to the output
    kind = "copy"        it adds its gate times the token itself (Routing.copy_T)
    renormalize = "all"  gates p / sum of the k chosen p
    renormalize = "real" gates of the real experts p / sum of those alone (AdaMoE); null choices
    weigh nothing, so not with "copy"
    renormalize = "none" gates p (MoE++)

counts, probs and importance run over all E + num_null classes, so a balance loss asks for k E / (E
+ num_null) real experts per token on average and lets each token differ. It sees the mean load of
the null classes for each of them (AdaMoE, section 3.4, eq. 6): one does what another does, so it is
their sum that is held; so do MaxVio and its like. The sum of gates, drops and active experts are of
the real experts. Ties go to the lower index, so to the real expert. MoE++'s constant experts,
gating residuals and unequal weights of the two kinds in the loss are not here.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe_jax.moe.routing.contract import (
    Arrays,
    Declared,
    Router,
    RouterCfg,
    Routing,
    Setting,
    Sizes,
    Tokens,
    linear_gate,
    router_logits,
    sees_nothing,
    token_choice,
)
from moe_jax.moe.routing.statistics import per_row, statistics
from moe_jax.schema.options import NUMBER, option
from moe_jax.weights import Weight


@dataclasses.dataclass(frozen=True)
class Options:
    k: int = option(4, "choices per token, real or null", NUMBER)
    num_null: int = option(8, "null experts, which compute nothing", NUMBER)
    kind: str = option(
        "zero", 'a null choice adds "zero", or a "copy" of the token', choices=("zero", "copy")
    )
    renormalize: str = option(
        "all",
        'gates divided by the sum of all choices, of the "real" ones, or "none"',
        choices=("all", "real", "none"),
    )


def params(sizes: Sizes, options: Options) -> dict[str, Weight]:
    """Declares one matrix [D, E + num_null]."""
    num_classes = sizes.num_experts + options.num_null
    return linear_gate(sizes._replace(num_experts=num_classes), options)


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Returns up to k assignments per token, in order of falling probability.

    Places of null choices go nowhere.
    """
    del state, rng, train
    router_logits_TC = router_logits(tokens.x_TD, params["gate"])
    router_probs_TC = jax.nn.softmax(router_logits_TC)
    prob_TK, class_index_TK = jax.lax.top_k(router_probs_TC, cfg.options.k)
    # Classes 0 to E - 1 are the real experts, those behind them the null experts.
    is_null_TK = class_index_TK >= cfg.num_experts
    gate_TK = gates(prob_TK, is_null_TK, cfg.options.renormalize)
    sums = statistics(router_logits_TC, class_index_TK, gate_TK, tokens)
    # A null expert is no assignment: drops and active experts are of the real ones alone.
    sums |= _counts_of_real(sums["counts"], cfg.num_experts)
    if cfg.options.kind == "zero":
        sums |= _gates_of_real(gate_TK, is_null_TK, tokens)
    routing = token_choice(class_index_TK, gate_TK, sums, tokens, cfg.num_experts)
    if cfg.options.kind == "zero":
        return routing
    # Padding copies nothing: its output stays 0.
    is_copy_TK = is_null_TK & tokens.valid_T[:, None]
    return routing._replace(copy_T=jnp.where(is_copy_TK, gate_TK, 0).sum(1))


def _counts_of_real(counts_bC: jax.Array, num_experts: int) -> dict[str, jax.Array]:
    """Returns the counts by which balance is judged, "level" [b, C], and "assigned" [b]."""
    # n = num_null.
    real_bE, null_bn = jnp.split(counts_bC, [num_experts], axis=1)
    # One null expert does what another does, so each is judged by the mean load of all of them.
    mean_b1 = null_bn.mean(1, keepdims=True)
    level_bn = jnp.broadcast_to(mean_b1, null_bn.shape)
    return {"level": jnp.concatenate([real_bE, level_bn], 1), "assigned": real_bE.sum(1)}


def _gates_of_real(
    gate_TK: jax.Array, is_null_TK: jax.Array, tokens: Tokens
) -> dict[str, jax.Array]:
    """Returns the sums of gates of the real experts alone: a null choice adds nothing."""
    weighs_nothing_TK = is_null_TK | ~tokens.valid_T[:, None]
    real_gate_TK = jnp.where(weighs_nothing_TK, 0, jax.lax.stop_gradient(gate_TK))
    return {
        "gate": per_row(real_gate_TK.sum(1), tokens),
        "gate_max": per_row(real_gate_TK.max(1), tokens),
    }


def gates(prob_TK: jax.Array, is_null_TK: jax.Array, renormalize: str) -> jax.Array:
    """Returns the gates [T, K] of the chosen classes.

    They are all zero where "real" finds no real expert.
    """
    if renormalize == "none":
        return prob_TK
    # With "real" the null choices weigh nothing, and the real ones share the whole weight.
    kept_TK = prob_TK if renormalize == "all" else jnp.where(is_null_TK, 0, prob_TK)
    total_T1 = kept_TK.sum(-1, keepdims=True)
    # A token without a real expert has no sum to divide by: its gates stay 0.
    return kept_TK / jnp.where(total_T1 > 0, total_T1, 1)


def declared(num_experts: int, options: Options) -> Declared:
    """Returns its promises; the gates of the real experts alone have no fixed sum."""
    # All k may be null; k num_null / (E + num_null) of them are on average.
    real = options.k * num_experts / (num_experts + options.num_null)
    copies = options.kind == "copy"
    return Declared(most=options.k, exact=False, gate_sum=None, average=real, copies=copies)


def multiplied(options: Options, n: int) -> Options:
    """Returns options with n times the choices, among n times the null experts too."""
    return dataclasses.replace(options, k=n * options.k, num_null=n * options.num_null)


def refusals(options: Options, setting: Setting) -> Iterator[str]:
    """Refuses to copy what has no weight."""
    at = setting.at
    if options.kind == "copy" and options.renormalize == "real":
        yield (
            f'{at}.renormalize = "real" gives null choices no weight, so {at}.kind = "copy" would '
            'copy nothing: set renormalize to "all" or "none", or kind to "zero"'
        )


ROUTER = Router(
    Options, route, sees_nothing, declared, params=params, refusals=refusals, multiplied=multiplied
)
