"""ReLU routing (ReMoE, Wang et al. 2024, arXiv:2412.14711, section 3, eq. 5-11): differentiable
everywhere, and as sparse as it is told.

    gates R = ReLU(x W);  a token uses every expert whose R is positive
    loss  + l1 * sum_e f_e mean_t R_te    f_e = E / (k n) * tokens with R_te > 0 if balanced, else 1
                                          (n valid tokens of the step)
    l1 <- l1 * alpha^sign(active - k n)   once per step: up when more than k experts per token were
                                          active, down when fewer

Here the shapes are static: of a token's active experts the `max_active` largest are served; what
lies beyond is an overflow, which counts as assigned (it drives l1) and as dropped. l1 is the state
of each layer, driven by that layer's own sparsity, while the paper has one for the mean over
layers. The loss only pushes down: a layer in which fewer than k are active stays there until the
language loss opens more (docs/routers.md has what was measured). So l1 never falls below its first
value, which does nothing: else it would take as many steps to come back as it had fallen.

A balance loss of moe/losses.py would act on R as if it were a distribution, and the z-loss closes
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
    class_statistics,
    per_row,
    router_logits,
    sees_nothing,
    token_choice,
)
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


LARGEST = 1e20  # of l1


def state(sizes: Sizes, options: Options) -> dict[str, Weight]:
    """The coefficient of the loss, from its first value on."""
    del sizes
    return {"l1": Weight((), (), 0.0, options.l1)}


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Up to max_active assignments a token, in order of falling gate; unused places go nowhere."""
    del rng, train
    logits_TE = router_logits(tokens.x_TD, params["gate"])
    relu_TE = jax.nn.relu(logits_TE)
    active_TE = relu_TE > 0
    gate_TK, expert_TK = jax.lax.top_k(relu_TE, cfg.options.max_active)
    over_T = jnp.maximum(active_TE.sum(1) - cfg.options.max_active, 0)
    valid_T = tokens.valid_T.astype(logits_TE.dtype)
    sums = class_statistics(logits_TE, active_TE, relu_TE, tokens, probs_TC=relu_TE)
    served = {"gate": gate_TK.sum(1), "gate_max": gate_TK[:, 0]}
    sums |= {
        name: per_row(jax.lax.stop_gradient(x_T) * valid_T, tokens) for name, x_T in served.items()
    }
    sums["dropped"] = per_row(over_T.astype(valid_T.dtype) * valid_T, tokens)
    sums["assigned"] = sums["counts"].sum(1)
    sums["l1_weight"] = state["l1"].astype(valid_T.dtype) * sums["tokens"]
    balance = cfg.num_experts / cfg.options.k
    one_bE = jnp.broadcast_to(sums["tokens"][:, None], sums["counts"].shape)
    sums["l1_load"] = balance * sums["counts"] if cfg.options.balanced else one_bE
    return token_choice(expert_TK, gate_TK, sums, tokens, cfg.num_experts, real_TK=gate_TK > 0)


def update(state: Arrays, totals: Arrays, cfg: RouterCfg) -> Arrays:
    """alpha^sign of (active experts - k times tokens): both are whole numbers, so every mesh takes
    the same branch.
    """
    sign = jnp.sign(totals["counts"].sum() - cfg.options.k * totals["tokens"]).astype(
        state["l1"].dtype
    )
    return {"l1": jnp.clip(state["l1"] * cfg.options.alpha**sign, cfg.options.l1, LARGEST)}


def declared(num_experts: int, options: Options) -> Declared:
    del num_experts
    return Declared(most=options.max_active, exact=False, gate_sum=None, average=options.k)


def balanced_by(options: Options) -> str:
    """Names the loss that comes with the router."""
    del options
    return "its own L1 loss"


def refusals(options: Options, setting: Setting) -> Iterator[str]:
    """A token needs room for as many experts as are active on average."""
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
)
