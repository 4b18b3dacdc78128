"""ReLU routing (ReMoE, Wang et al. 2024, arXiv:2412.14711, section 3, eq. 5-11): differentiable
everywhere, and as sparse as it is told.

    gates R = ReLU(x W);  a token uses every expert whose R is positive
    loss  + l1 * sum_e f_e mean_t R_te    f_e = E / (k n) * tokens with R_te > 0 if balanced, else 1
                                          (n valid tokens of the step)
    l1 <- l1 * alpha^sign(active - k n)   once per step: up when more than k experts per token were
                                          active, down when fewer

Here the shapes are static: of a token's active experts the `max_active` largest are served; what
lies beyond is an overflow, which counts as assigned (it drives l1) and as dropped. l1 is state: one
coefficient for all layers, driven by the mean of their sparsities, as in the paper, or one for each
layer (`shared`). The loss only pushes down: where fewer than k are active, the language loss alone
opens more (docs/routers.md has what was measured). So l1 never falls below its first value, which
does nothing: else it would take as many steps to come back as it had fallen.

A balance loss of moe/losses would act on R as if it were a distribution, and the z-loss closes
experts: give those coefficients 0; the refined l1 balances by itself.
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
    router_logits,
    sees_nothing,
    token_choice,
)
from moe_jax.moe.routing.statistics import class_statistics, per_row
from moe_jax.schema.options import FROM_ONE, IN_FLOAT32, NUMBER, option
from moe_jax.weights import Weight


@dataclasses.dataclass(frozen=True)
class Options:
    k: int = option(
        2,
        "active experts per token on average, to which the adaptive L1 loss brings them down",
        NUMBER,
    )
    max_active: int = option(
        4, "served experts of one token at most; the others are dropped", NUMBER
    )
    l1: float = option(1e-8, "first coefficient of the L1 loss", IN_FLOAT32)
    alpha: float = option(1.2, "factor by which a step changes the coefficient", FROM_ONE)
    balanced: bool = option(True, "the L1 loss weighs an expert by its load")
    shared: bool = option(
        True,
        "one coefficient for all layers, driven by their mean, as in the paper; False = each layer "
        "has its own",
    )


LARGEST = 1e20  # of l1


def state(sizes: Sizes, options: Options) -> dict[str, Weight]:
    """Declares the coefficient of the loss, which starts at the option l1."""
    del sizes
    return {"l1": Weight((), (), 0.0, options.l1)}


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Returns up to max_active assignments a token, in order of falling gate.

    Unused places go nowhere.
    """
    del rng, train
    router_logits_TE = router_logits(tokens.x_TD, params["gate"])
    relu_TE = jax.nn.relu(router_logits_TE)
    is_active_TE = relu_TE > 0
    # A token with fewer active experts fills its list with gates of 0, which go nowhere.
    # The shapes of a program are fixed, so each token has the same number of places.
    gate_TK, expert_index_TK = jax.lax.top_k(relu_TE, cfg.options.max_active)
    # All active experts count here, served or not: they are what drives l1.
    sums = class_statistics(router_logits_TE, is_active_TE, relu_TE, tokens, probs_TC=relu_TE)
    # The sums of gates become those of the served experts, which make the output.
    sums |= _sums_of_served(gate_TK, is_active_TE, tokens)
    sums |= _sums_of_l1(sums, state, cfg)
    is_served_TK = gate_TK > 0
    return token_choice(
        expert_index_TK, gate_TK, sums, tokens, cfg.num_experts, real_TK=is_served_TK
    )


def _sums_of_served(
    gate_TK: jax.Array, is_active_TE: jax.Array, tokens: Tokens
) -> dict[str, jax.Array]:
    """Returns the sums per row that are of the served experts alone, and of what overflows."""
    dtype = gate_TK.dtype
    valid_T = tokens.valid_T.astype(dtype)
    fixed_TK = jax.lax.stop_gradient(gate_TK)
    # Active experts beyond the `max_active` places of a token.
    overflow_T = jnp.maximum(is_active_TE.sum(1) - gate_TK.shape[1], 0)
    return {
        "gate": per_row(fixed_TK.sum(1) * valid_T, tokens),
        "gate_max": per_row(fixed_TK[:, 0] * valid_T, tokens),
        "dropped": per_row(overflow_T.astype(dtype) * valid_T, tokens),
    }


def _sums_of_l1(sums: Arrays, state: Arrays, cfg: RouterCfg) -> dict[str, jax.Array]:
    """Returns the sums per row that moe/losses/l1.py reads; active experts count as assigned."""
    counts_bE, tokens_b = sums["counts"], sums["tokens"]
    # The loss divides by the tokens again: that turns a sum per row into the state.
    l1_weight_b = state["l1"].astype(tokens_b.dtype) * tokens_b
    if cfg.options.balanced:
        l1_load_bE = cfg.num_experts / cfg.options.k * counts_bE
    else:
        l1_load_bE = jnp.broadcast_to(tokens_b[:, None], counts_bE.shape)
    return {"assigned": counts_bE.sum(1), "l1_weight": l1_weight_b, "l1_load": l1_load_bE}


def update(state: Arrays, totals: Arrays, cfg: RouterCfg) -> Arrays:
    """Returns l1 * alpha^sign(active experts - k times tokens)."""
    l1 = state["l1"]
    # Both numbers are whole, so every mesh takes the same branch.
    num_active = totals["counts"].sum()
    num_intended = cfg.options.k * totals["tokens"]
    excess = num_active - num_intended
    if cfg.options.shared:
        excess = cfg.mean_over_layers(excess)
    # A fixed factor up or down: how far off the sparsity is makes no difference.
    sign = jnp.sign(excess).astype(l1.dtype)
    return {"l1": jnp.clip(l1 * cfg.options.alpha**sign, cfg.options.l1, LARGEST)}


def declared(num_experts: int, options: Options) -> Declared:
    del num_experts
    return Declared(most=options.max_active, exact=False, gate_sum=None, average=options.k)


def balanced_by(options: Options) -> str:
    """Names the loss that comes with the router."""
    del options
    return "its own L1 loss"


def multiplied(options: Options, n: int) -> Options:
    """Returns options by which n times as many experts are active."""
    return dataclasses.replace(options, k=n * options.k, max_active=n * options.max_active)


def refusals(options: Options, setting: Setting) -> Iterator[str]:
    """Refuses fewer places for a token than experts are active on average."""
    at, num_experts = setting.at, setting.num_experts
    if not options.k <= options.max_active <= num_experts:
        yield (
            f"{at}.max_active ({options.max_active}) must lie between {at}.k ({options.k}) and "
            f"model.moe.num_experts ({num_experts})"
        )


ROUTER = Router(
    Options,
    route,
    sees_nothing,
    declared,
    state=state,
    update=update,
    balanced_by=balanced_by,
    no_losses=("z",),
    own_loss=True,
    refusals=refusals,
    multiplied=multiplied,
)
