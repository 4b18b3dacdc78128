"""Multi-gate mixture of experts (Ma et al. 2018, KDD, doi:10.1145/3219819.3220007, eq. 6-7): a gate
of its own for every task.

    p = softmax(x W_g), with g the token's position modulo the number of gates;  the k largest p;
    gates p / sum(p) if renormalize, else p

In the model mmoe the tasks of a row are its tokens, and position is the task. k = E is the paper's
dense mixture. The logits of all gates are computed and one is taken: a gathered matrix for every
token would be E D numbers each. Shapes: G gates.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.routing.contract import (
    Arrays,
    Declared,
    Router,
    RouterCfg,
    Routing,
    Sizes,
    Tokens,
    sees_nothing,
    times_k,
    token_choice,
)
from moe_jax.moe.routing.statistics import statistics
from moe_jax.moe.routing.top_k import renormalized
from moe_jax.precision import wide_dtype
from moe_jax.schema.options import NUMBER, option
from moe_jax.weights import Weight


@dataclasses.dataclass(frozen=True)
class Options:
    k: int = option(2, "num_experts = the paper's dense mixture", NUMBER)
    num_gates: int = option(2, "one for each task of the model mmoe", NUMBER)
    renormalize: bool = option(True, "gates of a token sum to 1")


def params(sizes: Sizes, options: Options) -> dict[str, Weight]:
    """Declares one matrix [D, E] for each gate."""
    shape = (options.num_gates, sizes.d_model, sizes.num_experts)
    return {"gate": Weight(shape, (None, "embed", None), sizes.d_model**-0.5)}


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Returns k assignments per token by the gate of its position, in order of falling gate."""
    del state, rng, train
    router_logits_TE = logits_of_task(tokens, params["gate"])
    router_probs_TE = jax.nn.softmax(router_logits_TE)
    gate_TK, expert_index_TK = jax.lax.top_k(router_probs_TE, cfg.options.k)
    if cfg.options.renormalize:
        gate_TK = renormalized(gate_TK)
    sums = statistics(router_logits_TE, expert_index_TK, gate_TK, tokens)
    return token_choice(expert_index_TK, gate_TK, sums, tokens, cfg.num_experts)


def logits_of_task(tokens: Tokens, gate_GDE: jax.Array) -> jax.Array:
    """Returns x W_g [T, E] in at least float32, with g the token's position modulo G."""
    wide = wide_dtype(tokens.x_TD.dtype)
    x_TD = tokens.x_TD.astype(wide)
    gate_GDE = gate_GDE.astype(wide)
    highest = jax.lax.Precision.HIGHEST
    # The logits of all gates are cheaper than a matrix [D, E] gathered for every token.
    router_logits_TGE = jnp.einsum("TD,GDE->TGE", x_TD, gate_GDE, precision=highest)
    # Of the G logits of an expert each token keeps that of its own gate.
    task_T = tokens.position_T % gate_GDE.shape[0]
    return jnp.take_along_axis(router_logits_TGE, task_T[:, None, None], 1)[:, 0]


def declared(num_experts: int, options: Options) -> Declared:
    del num_experts
    return Declared(most=options.k, exact=True, gate_sum=1.0 if options.renormalize else None)


def num_gates(options: Options) -> int:
    """Returns the number of gates, one for each task."""
    return options.num_gates


ROUTER = Router(
    Options, route, sees_nothing, declared, params=params, num_gates=num_gates, multiplied=times_k
)
