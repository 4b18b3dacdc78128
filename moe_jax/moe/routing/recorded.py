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
    statistics,
    token_choice,
)
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
    """The recorded assignments, in their order.

    UserError for a batch without a recording, or one of another k.
    """
    del state, rng, train
    expert_TK, gate_TK = _recording(tokens, cfg.options.k)
    logits_TE = router_logits(tokens.x_TD, params["gate"])
    real_TK = (expert_TK >= 0) & (expert_TK < cfg.num_experts)
    expert_TK = jnp.where(real_TK, expert_TK, cfg.num_experts)
    if cfg.options.gates == "router":
        logits_TK = jnp.take_along_axis(logits_TE, jnp.minimum(expert_TK, cfg.num_experts - 1), 1)
        gate_TK = jax.nn.softmax(logits_TK, where=real_TK)
    gate_TK = jnp.where(real_TK, gate_TK.astype(logits_TE.dtype), 0)
    expert_TK, gate_TK, real_TK = _once(expert_TK, gate_TK, real_TK, cfg.num_experts)
    sums = statistics(logits_TE, expert_TK, gate_TK, tokens, real_TK=real_TK)
    return token_choice(expert_TK, gate_TK, sums, tokens, cfg.num_experts)


def _once(expert_TK: jax.Array, gate_TK: jax.Array, real_TK: jax.Array, num_experts: int):
    """The same assignments, where each of a token's experts stands once: at its first place, with
    all its gates.
    """
    same_TKK = (expert_TK[:, :, None] == expert_TK[:, None, :]) & real_TK[:, :, None]
    earlier_KK = jnp.tri(expert_TK.shape[1], k=-1, dtype=bool)
    real_TK = real_TK & ~(same_TKK & earlier_KK[None]).any(2)
    gate_TK = jnp.where(real_TK, jnp.where(same_TKK, gate_TK[:, None, :], 0).sum(2), 0)
    return jnp.where(real_TK, expert_TK, num_experts), gate_TK, real_TK


def _recording(tokens: Tokens, k: int) -> tuple[jax.Array, jax.Array]:
    if not len(tokens.recorded):
        raise UserError(
            'model.moe.router = "recorded" replays a recording, and this batch has none: it is for '
            "the instruments that record and "
            "replay a run's routing; to train, sample or plan a model choose another router"
        )
    expert_TK, gate_TK = tokens.recorded
    if expert_TK.shape[1] != k:
        raise UserError(
            f"model.moe.routers.recorded.k ({k}) must be the number of choices in the recording "
            f"({expert_TK.shape[1]})"
        )
    return expert_TK, gate_TK


def declared(num_experts: int, options: Options) -> Declared:
    del num_experts
    return Declared(most=options.k, exact=False, gate_sum=None, average=options.average or None)


ROUTER = Router(Options, route, sees_nothing, declared, replays=True)
