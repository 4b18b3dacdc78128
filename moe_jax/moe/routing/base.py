"""Balanced assignment by Sinkhorn's algorithm.

It is that of BASE layers (Lewis et al. 2021, arXiv:2103.16716, section 3) as S-BASE solves them
(Clark et al. 2022, arXiv:2202.01169, section 3.1 and appendix B.2).

    in training     the k largest of x W + b, with the b of `iterations` Sinkhorn steps:
                        P_te = softmax over e of (x W + b)
                        b_e <- b_e + log((n / E) / sum over the n valid tokens of P_te)
    in evaluation   the k largest of x W: greedy, token by token, so causal
    gates           "sigmoid": sigmoid(x W) of the chosen (BASE, eq. 1)
                    "softmax": softmax(x W) of the chosen (S-BASE)

The transport plan diag(u) exp(x W) diag(v) has n / E tokens' worth of mass in every column; its
rows' factors u do not change which of a token's entries is largest, so b = log v is all that the
selection needs. BASE solves the assignment exactly (an auction); the k largest of the plan are only
nearly balanced, more so the more peaked the scores are. No gradient goes through b.

The tokens that are balanced: scope = "group" those of a group; "batch" all of the micro-batch, over
all devices, which is why it cannot be exact under gradient accumulation and is refused there. BASE
shuffles tokens across devices first, because those of one sequence want the same experts: "batch",
or groups of several rows, are nearer to it than the default group of one row. Either way a training
step lets a token's experts depend on later tokens.
Shapes: G groups, t tokens of a group.
"""

import dataclasses
from collections.abc import Callable, Iterator

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
    times_k,
    token_choice,
)
from moe_jax.moe.routing.statistics import statistics
from moe_jax.schema.options import NUMBER, option

GATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "softmax": jax.nn.softmax,
}


@dataclasses.dataclass(frozen=True)
class Options:
    k: int = option(1, "experts per token", NUMBER)
    iterations: int = option(10, "of Sinkhorn", NUMBER)
    scope: str = option(
        "group",
        'what is balanced: each "group", or the whole "batch" (not with micro-batches)',
        choices=("group", "batch"),
    )
    gates: str = option(
        "sigmoid",
        'of the chosen scores (BASE), or "softmax" (S-BASE)',
        choices=tuple(GATES),
    )


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Returns k assignments per token, in order of falling score.

    They are balanced in training, and greedy otherwise.
    """
    del state, rng
    router_logits_TE = router_logits(tokens.x_TD, params["gate"])
    score_TE = jax.lax.stop_gradient(router_logits_TE)
    if train:
        score_TE = balanced(score_TE, tokens, cfg)
    _, expert_index_TK = jax.lax.top_k(score_TE, cfg.options.k)
    # The bias chooses experts and does not weigh them: gates are of the logits alone.
    all_gates_TE = GATES[cfg.options.gates](router_logits_TE)
    gate_TK = jnp.take_along_axis(all_gates_TE, expert_index_TK, 1)
    sums = statistics(router_logits_TE, expert_index_TK, gate_TK, tokens)
    return token_choice(expert_index_TK, gate_TK, sums, tokens, cfg.num_experts)


def balanced(router_logits_TE: jax.Array, tokens: Tokens, cfg: RouterCfg) -> jax.Array:
    """Returns x W + b, [T, E], with b per group, or of the whole batch."""
    num_experts = router_logits_TE.shape[1]
    if cfg.options.scope == "batch":
        num_groups, total = 1, cfg.total
    else:
        # A group lies on one device, so there is nothing to sum over devices.
        num_groups, total = tokens.num_rows // cfg.group_rows, _as_it_is
    # Rows are contiguous and a group is some of them, so a reshape makes the groups.
    router_logits_GtE = router_logits_TE.reshape(num_groups, -1, num_experts)
    valid_Gt1 = tokens.valid_T.reshape(num_groups, -1, 1).astype(router_logits_TE.dtype)
    bias_GE = sinkhorn(router_logits_GtE, valid_Gt1, cfg.options.iterations, total)
    # One bias of an expert for all tokens of its group, as the factor v of the plan's column.
    biased_GtE = router_logits_GtE + bias_GE[:, None]
    return biased_GtE.reshape(-1, num_experts)


def _as_it_is(x: jax.Array) -> jax.Array:
    return x


def sinkhorn(
    router_logits_GtE: jax.Array,
    valid_Gt1: jax.Array,
    iterations: int,
    total: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Returns b [G, E] after so many steps from 0; a group without valid tokens has b = 0.

    `total` sums over the devices that share the tokens.
    """
    num_experts = router_logits_GtE.shape[2]
    # n / E: the mass that each column of the plan is to have.
    share_G1 = total(valid_Gt1.sum(1)) / num_experts
    # Without tokens both logarithms are that of `tiny`, and their difference is 0.
    tiny = jnp.finfo(router_logits_GtE.dtype).tiny
    log_share_G1 = jnp.log(jnp.maximum(share_G1, tiny))

    def step(_, bias_GE: jax.Array) -> jax.Array:
        # The softmax gives every token a mass of 1. Padding has none.
        plan_GtE = jax.nn.softmax(router_logits_GtE + bias_GE[:, None]) * valid_Gt1
        mass_GE = total(plan_GtE.sum(1))
        log_mass_GE = jnp.log(jnp.maximum(mass_GE, tiny))
        # To multiply a column by share / mass is to add its logarithm to the column's logits.
        return bias_GE + (log_share_G1 - log_mass_GE)

    # The carry of a loop must vary over the mesh as what a step returns does: as `total` of scores.
    zero_GE = jnp.zeros_like(total(router_logits_GtE.sum(1)))
    return jax.lax.fori_loop(0, iterations, step, zero_GE)


def sees(options: Options) -> Sees:
    """Returns what a training step sees: evaluation is greedy."""
    return Sees(future=True, batch=options.scope == "batch")


def declared(num_experts: int, options: Options) -> Declared:
    del num_experts
    return Declared(most=options.k, exact=True, gate_sum=None)


def balanced_by(options: Options) -> str:
    """Names the assignment."""
    del options
    return "its assignment"


def refusals(options: Options, setting: Setting) -> Iterator[str]:
    """Refuses micro-batches for a balance over the whole batch, which needs it at once."""
    num_micro_batches = setting.batch_size // setting.micro_batch_size
    if options.scope == "batch" and num_micro_batches > 1:
        yield (
            f'{setting.at}.scope = "batch" balances over all tokens at once, which '
            f"{num_micro_batches} micro-batches (train.batch_size {setting.batch_size} / "
            f"train.micro_batch_size {setting.micro_batch_size}) are not: set "
            "train.micro_batch_size=0, or the scope to group"
        )


ROUTER = Router(
    Options, route, sees, declared, balanced_by=balanced_by, refusals=refusals, multiplied=times_k
)
