"""ReLU routing (ReMoE, Wang et al.

2024, arXiv:2412.14711, section 3, eq. 5-11): differentiable everywhere, and as sparse as it is
told.

    gates R = ReLU(x W);  a token uses every expert whose R is positive
    loss  + l1 * sum_e f_e mean_t R_te       f_e = E / (k n) * tokens with R_te > 0 if balanced, else 1     (n valid tokens of the step)
    l1 <- l1 * alpha^sign(active - k n)     once per step: up when more than k experts per token were active, down when fewer

Here the shapes are static: of a token's active experts the `max_active` largest are served; what
lies beyond is an overflow, which counts as assigned (it drives l1) and as dropped. l1 is the state
of each layer, driven by that layer's own sparsity, while the paper has one for the mean over
layers. The loss only pushes down: a layer in which fewer than k are active stays there until the
language loss opens more (docs/routers.md has what was measured). So l1 never falls below its first
value, which does nothing: else it would take as many steps to come back as it had fallen.

A balance loss of moe/losses.py would act on R as if it were a distribution, and the z-loss closes
experts: give those coefficients 0; the refined l1 balances by itself.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe.routing.contract import (
    Arrays,
    Declared,
    RouterCfg,
    Routing,
    Sizes,
    Tokens,
    class_statistics,
    per_row,
    router_logits,
    token_choice,
)
from moe_jax.weights import Weight

LARGEST = 1e20  # of l1


def state(sizes: Sizes, options: Mapping[str, Any]) -> dict[str, Weight]:
    """The coefficient of the loss, from its first value on."""
    del sizes
    return {"l1": Weight((), (), 0.0, options["l1"])}


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Up to max_active assignments per token, in order of falling gate; unused places go nowhere."""
    del rng, train
    logits_TE = router_logits(tokens.x_TD, params["gate"])
    relu_TE = jax.nn.relu(logits_TE)
    active_TE = relu_TE > 0
    gate_TK, expert_TK = jax.lax.top_k(relu_TE, cfg.options["max_active"])
    over_T = jnp.maximum(active_TE.sum(1) - cfg.options["max_active"], 0)
    valid_T = tokens.valid_T.astype(logits_TE.dtype)
    sums = class_statistics(logits_TE, active_TE, relu_TE, tokens, probs_TC=relu_TE)
    served = {"gate": gate_TK.sum(1), "gate_max": gate_TK[:, 0]}
    sums |= {
        name: per_row(jax.lax.stop_gradient(x_T) * valid_T, tokens) for name, x_T in served.items()
    }
    sums["dropped"] = per_row(over_T.astype(valid_T.dtype) * valid_T, tokens)
    sums["assigned"] = sums["counts"].sum(1)
    sums["l1_weight"] = state["l1"].astype(valid_T.dtype) * sums["tokens"]
    balance = cfg.num_experts / cfg.options["k"]
    one_bE = jnp.broadcast_to(sums["tokens"][:, None], sums["counts"].shape)
    sums["l1_load"] = balance * sums["counts"] if cfg.options["balanced"] else one_bE
    return token_choice(expert_TK, gate_TK, sums, tokens, cfg.num_experts, real_TK=gate_TK > 0)


def update(state: Arrays, totals: Arrays, cfg: RouterCfg) -> Arrays:
    """alpha^sign of (active experts - k times tokens): both are whole numbers, so every mesh takes
    the same branch.
    """
    sign = jnp.sign(totals["counts"].sum() - cfg.options["k"] * totals["tokens"]).astype(
        state["l1"].dtype
    )
    return {"l1": jnp.clip(state["l1"] * cfg.options["alpha"] ** sign, cfg.options["l1"], LARGEST)}


def declared(num_experts: int, options: Mapping[str, Any]) -> Declared:
    del num_experts
    return Declared(most=options["max_active"], exact=False, gate_sum=None, average=options["k"])
