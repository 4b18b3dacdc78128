"""What a router reads and returns. Shapes: T tokens of this device, N assignments, b rows (sequences) of this device, E experts."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """What a router may read, one entry per token of this device; rows are contiguous runs of T / num_rows tokens."""

    x_TD: jax.Array
    id_T: jax.Array
    position_T: jax.Array
    row_T: jax.Array  # global row id, carried by the batch: randomness folds it in, never a device index
    segment_T: jax.Array
    valid_T: jax.Array  # False for padding
    num_rows: int


class Routing(NamedTuple):
    """Assignments in order of priority: earlier ones win capacity. `expert_N == E` goes nowhere (padding, an unused place)."""

    token_N: jax.Array
    expert_N: jax.Array
    gate_N: jax.Array
    sums: Mapping[str, jax.Array]  # per row: counts [b, E], probs [b, E], z, entropy, gate, gate_max, tokens [b]
    per_token: int  # k > 0: token_N is exactly 0,0,..(k times),1,1,..; 0: any order, any number


class RouterCfg(NamedTuple):
    """What every router is told: the number of experts, and the options of its own block in the config."""

    num_experts: int
    options: Mapping[str, Any]
    total: Callable[
        [jax.Array], jax.Array
    ]  # sums over the batch's devices; the identity for routers that balance per group


def per_row(x_T: jax.Array, tokens: Tokens) -> jax.Array:
    """Sums a per-token statistic [T, ...] over the tokens of each row: [b, ...]."""
    return x_T.reshape((tokens.num_rows, -1) + x_T.shape[1:]).sum(1)


def statistics(logits_TE: jax.Array, expert_TK: jax.Array, gate_TK: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
    """The sums per row that every load-balancing loss and every load metric is made of; padding counts nowhere."""
    num_experts = logits_TE.shape[1]
    valid_T = tokens.valid_T.astype(logits_TE.dtype)
    chosen_TE = (expert_TK[:, :, None] == jnp.arange(num_experts)[None, None, :]).sum(1).astype(logits_TE.dtype)
    log_TE = jax.nn.log_softmax(logits_TE)
    probs_TE = jnp.exp(log_TE)
    z_T = jax.nn.logsumexp(logits_TE, -1) ** 2
    entropy_T = -(probs_TE * log_TE).sum(-1)
    return {
        "counts": per_row(chosen_TE * valid_T[:, None], tokens),
        "probs": per_row(probs_TE * valid_T[:, None], tokens),
        "z": per_row(z_T * valid_T, tokens),
        "entropy": per_row(jax.lax.stop_gradient(entropy_T) * valid_T, tokens),
        "gate": per_row(jax.lax.stop_gradient(gate_TK.sum(-1)) * valid_T, tokens),
        "gate_max": per_row(jax.lax.stop_gradient(gate_TK.max(-1)) * valid_T, tokens),
        "tokens": per_row(valid_T, tokens),
    }
