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
    per_row,
    router_logits,
    sees_nothing,
    statistics,
    token_choice,
)
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
    """One matrix [D, E + num_null]."""
    return linear_gate(sizes._replace(num_experts=sizes.num_experts + options.num_null), options)


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Up to k assignments per token, in order of falling probability; places of null choices go
    nowhere.
    """
    del state, rng, train
    logits_TC = router_logits(tokens.x_TD, params["gate"])
    prob_TK, class_TK = jax.lax.top_k(jax.nn.softmax(logits_TC), cfg.options.k)
    null_TK = class_TK >= cfg.num_experts
    gate_TK = gates(prob_TK, null_TK, cfg.options.renormalize)
    sums = statistics(logits_TC, class_TK, gate_TK, tokens)
    real_bE, null_bC = jnp.split(sums["counts"], [cfg.num_experts], axis=1)
    sums["level"] = jnp.concatenate(
        [real_bE, jnp.broadcast_to(null_bC.mean(1, keepdims=True), null_bC.shape)], 1
    )
    sums["assigned"] = real_bE.sum(1)
    if cfg.options.kind == "zero":  # gates of what does nothing weigh nothing
        real_TK = jnp.where(null_TK | ~tokens.valid_T[:, None], 0, jax.lax.stop_gradient(gate_TK))
        sums |= {
            "gate": per_row(real_TK.sum(1), tokens),
            "gate_max": per_row(real_TK.max(1), tokens),
        }
    routing = token_choice(class_TK, gate_TK, sums, tokens, cfg.num_experts)
    if cfg.options.kind == "zero":
        return routing
    return routing._replace(copy_T=jnp.where(null_TK & tokens.valid_T[:, None], gate_TK, 0).sum(1))


def gates(prob_TK: jax.Array, null_TK: jax.Array, renormalize: str) -> jax.Array:
    """Gates [T, K] of the chosen classes; all zero where "real" finds no real expert."""
    if renormalize == "none":
        return prob_TK
    kept_TK = prob_TK if renormalize == "all" else jnp.where(null_TK, 0, prob_TK)
    total_T1 = kept_TK.sum(-1, keepdims=True)
    return kept_TK / jnp.where(total_T1 > 0, total_T1, 1)


def declared(num_experts: int, options: Options) -> Declared:
    """The gates of the real experts alone have no fixed sum: all k may be null, k num_null / (E +
    num_null) are on average.
    """
    real = options.k * num_experts / (num_experts + options.num_null)
    copies = options.kind == "copy"
    return Declared(most=options.k, exact=False, gate_sum=None, average=real, copies=copies)


def refusals(options: Options, setting: Setting) -> Iterator[str]:
    """What has no weight cannot be copied."""
    at = setting.at
    if options.kind == "copy" and options.renormalize == "real":
        yield (
            f'{at}.renormalize = "real" gives null choices no weight, so {at}.kind = "copy" would '
            'copy nothing: set renormalize to "all" or "none", or kind to "zero"'
        )


ROUTER = Router(Options, route, sees_nothing, declared, params=params, refusals=refusals)
