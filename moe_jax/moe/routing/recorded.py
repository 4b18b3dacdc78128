"""Replay: the experts of a recording, whatever the present router would choose (instruments make
and change recordings).

    experts = those recorded for the token; E there means nowhere gates "recorded": the recorded
    gates;  "router": softmax(x W) over the token's recorded experts, so that gradients reach the
    router

The batch carries the recording (`Tokens.recorded`: experts and gates [T, k]); the router reads it
and nothing else of the batch, so it is causal whatever router was recorded. The matrix is there
with either choice of gates, so that the parameters of a run with another router of one matrix fit;
z, probs and entropy are those of the present router. An expert that a recording names twice for a
token is served once, with the sum of both gates: a dispatcher takes a token's experts to be
different.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.moe.routing.contract import (
    Arrays,
    Declared,
    Router,
    RouterCfg,
    Routing,
    Tokens,
    router_logits,
    sees_nothing,
    token_choice,
)
from moe_jax.moe.routing.statistics import statistics
from moe_jax.schema.options import NOT_NEGATIVE, NUMBER, option


@dataclasses.dataclass(frozen=True)
class Options:
    k: int = option(2, "choices per token in the recording", NUMBER)
    average: float = option(
        0.0,
        "experts per token when the load is as intended, where that is fewer; 0 = k",
        NOT_NEGATIVE,
    )
    gates: str = option(
        "recorded",
        'or "router": softmax of the present router over the recorded experts',
        choices=("recorded", "router"),
    )


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Returns the recorded assignments, in their order.

    Raises UserError for a batch without a recording, or one of another k.
    """
    del state, rng, train
    num_experts = cfg.num_experts
    expert_index_TK, gate_TK = _recording(tokens, cfg.options.k)
    router_logits_TE = router_logits(tokens.x_TD, params["gate"])
    real_TK = (expert_index_TK >= 0) & (expert_index_TK < num_experts)
    expert_index_TK = jnp.where(real_TK, expert_index_TK, num_experts)
    if cfg.options.gates == "router":
        # Any expert does for a choice of nowhere: the softmax leaves it out.
        in_bounds_TK = jnp.minimum(expert_index_TK, num_experts - 1)
        chosen_logits_TK = jnp.take_along_axis(router_logits_TE, in_bounds_TK, 1)
        gate_TK = jax.nn.softmax(chosen_logits_TK, where=real_TK)
    # A choice of nowhere weighs nothing, whatever was recorded of it.
    gate_TK = jnp.where(real_TK, gate_TK.astype(router_logits_TE.dtype), 0)
    expert_index_TK, gate_TK, real_TK = _each_once(expert_index_TK, gate_TK, real_TK, num_experts)
    # Logits and probabilities are those of the present router, counts those of the recording.
    sums = statistics(router_logits_TE, expert_index_TK, gate_TK, tokens, real_TK=real_TK)
    return token_choice(expert_index_TK, gate_TK, sums, tokens, num_experts)


def _each_once(
    expert_index_TK: jax.Array, gate_TK: jax.Array, real_TK: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the same assignments, where each of a token's experts stands once.

    It stands at its first place, with the sum of its gates.
    """
    # [t, i, j] is true where the choices i and j of a token name the same real expert.
    same_TKK = expert_index_TK[:, :, None] == expert_index_TK[:, None, :]
    same_TKK = same_TKK & real_TK[:, :, None]
    # [i, j] is true where choice j comes before choice i.
    earlier_KK = jnp.tri(expert_index_TK.shape[1], k=-1, dtype=bool)
    repeats_TK = (same_TKK & earlier_KK[None]).any(2)
    real_TK = real_TK & ~repeats_TK
    # Every place gets the sum of its expert's gates; only the first of them keeps it.
    summed_gate_TK = jnp.where(same_TKK, gate_TK[:, None, :], 0).sum(2)
    gate_TK = jnp.where(real_TK, summed_gate_TK, 0)
    expert_index_TK = jnp.where(real_TK, expert_index_TK, num_experts)
    return expert_index_TK, gate_TK, real_TK


def _recording(tokens: Tokens, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns (expert_index [T, k], gates [T, k]) that the batch carries."""
    if not len(tokens.recorded):
        raise UserError(
            'model.moe.router = "recorded" replays a recording, and this batch has none: it is for '
            "the instruments that record and "
            "replay a run's routing; to train, sample or plan a model choose another router"
        )
    expert_index_TK, gate_TK = tokens.recorded
    recorded_k = expert_index_TK.shape[1]
    if recorded_k != k:
        raise UserError(
            f"model.moe.routers.recorded.k ({k}) must be the number of choices in the recording "
            f"({recorded_k})"
        )
    return expert_index_TK, gate_TK


def declared(num_experts: int, options: Options) -> Declared:
    del num_experts
    return Declared(most=options.k, exact=False, gate_sum=None, average=options.average or None)


ROUTER = Router(Options, route, sees_nothing, declared, replays=True)
