"""What an instrument may ask of an MoE layer: a record of its routing, experts that are removed,
experts that are barred.

All of it travels in the layer's `Batch` as a Request and is compiled in only when it is there.

Shapes: b rows of this device, S sequence, T = b S tokens, D model, E experts, K choices of a token
(E where a router has no fixed number), N assignments, G groups, t tokens of a group, p slots.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.moe.routing.contract import NEVER, Routing, Slots, Tokens

# What the names of a record begin with, among the sums of a layer.
NAME = "record/"
# `Request.record`. A dict with empty values is a pytree without leaves, so it is static.
ROUTING = {"routing": ()}
# Also the activations that the router reads.
INPUTS = {"routing": (), "inputs": ()}
# What weighs the experts' outputs, for a proof: see `gates`.
GATES = {"gates": ()}


class Request(NamedTuple):
    """Holds what instruments ask of an MoE layer; () in a field = nothing.

    The arrays of one layer are [B, ...]. A model takes those of all M blocks, [M, B, ...], and a
    batch of text has them as [B, M, ...], so that micro-batches split its rows.
    """

    # (experts [B, S, K], gates [B, S, K]) that the router "recorded" replays.
    recorded: Any = ()
    # bool [B, E]: experts whose assignments go nowhere.
    removed: Any = ()
    # bool [B, E]: experts that the router must go round.
    barred: Any = ()
    # What to return of each token: ROUTING, INPUTS or GATES.
    record: Any = ()


def record(
    routing: Routing | Slots,
    dropped_N: jax.Array,
    tokens: Tokens,
    wanted: Mapping[str, Any],
    num_experts: int,
) -> dict[str, jax.Array]:
    """Returns the record of this device: "expert" (int32, E = nowhere), "gate" and "dropped",
    [b, S, K] each, and "input" [b, S, D] where it is `wanted`.

    The routing is the router's, and "dropped" what ordering or dispatcher make of it. What the
    router never lists (ReLU's overflow) is not in it. A router without a fixed number of choices is
    recorded with K = E places, place e for expert e. Raises UserError for a router that mixes
    tokens, as it makes no assignments, and for one whose null experts copy the token.
    """
    if not isinstance(routing, Routing):
        raise UserError(
            "a router that mixes tokens (soft MoE) makes no assignments that could be recorded"
        )
    if routing.copy_T is not None:
        raise UserError(
            "null experts that copy the token are no assignments: their weight cannot be recorded"
        )
    num_tokens = tokens.valid_T.shape[0]
    fields_TK = _per_token(routing, dropped_N, num_tokens, num_experts)
    if "inputs" in wanted:
        fields_TK["input"] = tokens.x_TD
    return _by_row(fields_TK, tokens)


def _by_row(fields: Mapping[str, jax.Array], tokens: Tokens) -> dict[str, jax.Array]:
    """Returns fields [T, ...] as [b, S, ...], under the names of a record."""
    return {
        NAME + name: z.reshape((tokens.num_rows, -1) + z.shape[1:]) for name, z in fields.items()
    }


def gates(routing: Routing | Slots, tokens: Tokens, num_experts: int) -> dict[str, jax.Array]:
    """Returns what a dispatcher is given, as dense arrays of this device.

    Gradients reach the router through them: they are for a proof that computes the layer without
    any dispatcher. Of assignments, {"gate": [b, S, E], "copy": [b, S]}: y = sum over e of gate *
    expert_e(x), plus copy * x. Of mixtures, {"dispatch", "combine": [b, S, E, p]}, whose tokens are
    those of a group.
    """
    if not isinstance(routing, Routing):
        mixtures = {"dispatch": routing.dispatch_GtEp, "combine": routing.combine_GtEp}
        fields = {name: z.reshape((-1,) + z.shape[2:]) for name, z in mixtures.items()}
        return _by_row(fields, tokens)
    num_tokens = tokens.valid_T.shape[0]
    zero_TE = jnp.zeros_like(routing.gate_N, shape=(num_tokens, num_experts))
    # Assignments to nowhere have expert E, which is out of bounds.
    pair_N = (routing.token_N, routing.expert_index_N)
    gate_TE = zero_TE.at[pair_N].add(routing.gate_N, mode="drop")
    copy_T = jnp.zeros_like(gate_TE[:, 0]) if routing.copy_T is None else routing.copy_T
    return _by_row({"gate": gate_TE, "copy": copy_T}, tokens)


def _per_token(
    routing: Routing, dropped_N: jax.Array, num_tokens: int, num_experts: int
) -> dict[str, jax.Array]:
    """Returns the list of assignments as fields [T, K], K = E where K is not fixed."""
    fields = {"expert": routing.expert_index_N, "gate": routing.gate_N, "dropped": dropped_N}
    if routing.per_token:
        return {name: z.reshape(num_tokens, -1) for name, z in fields.items()}
    pair_N = (routing.token_N, routing.expert_index_N)

    def scatter(z_N: jax.Array) -> jax.Array:
        zero_TE = jnp.zeros_like(z_N, shape=(num_tokens, num_experts))
        return zero_TE.at[pair_N].set(z_N, mode="drop")

    # An entry to nowhere has expert E, which is out of bounds: it sets nothing.
    is_chosen_TE = scatter(routing.expert_index_N < num_experts)
    expert_E = jnp.arange(num_experts, dtype=jnp.int32)
    expert_index_TE = jnp.where(is_chosen_TE, expert_E[None], num_experts)
    return {
        "expert": expert_index_TE,
        "gate": scatter(routing.gate_N),
        "dropped": scatter(dropped_N),
    }


def split(sums: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns (the sums of the layers, their record without the prefix of its names)."""
    layer_sums, records = {}, {}
    for name, z in sums.items():
        if name.startswith(NAME):
            records[name.removeprefix(NAME)] = z
        else:
            layer_sums[name] = z
    return layer_sums, records


def bar(
    params: Mapping[str, jax.Array], tokens: Tokens, barred_bE: jax.Array
) -> tuple[dict[str, jax.Array], Tokens]:
    """Returns (params, tokens) with which a router never chooses the barred experts of a row.

    Each token carries the mask of its row as E further features, and each matrix has E further
    lines: NEVER on the gate's diagonal. So a barred expert's logit falls by that, whatever else
    the router does. Raises UserError for a router without a linear gate.
    """
    num_experts, d_model = barred_bE.shape[1], tokens.x_TD.shape[1]
    if "gate" not in params or params["gate"].shape != (d_model, num_experts):
        raise UserError(
            "only a router with a linear gate can be told to go round an expert: it has no logit "
            "to mask"
        )

    def longer(w: jax.Array, below: jax.Array) -> jax.Array:
        return jnp.concatenate([w, below.astype(w.dtype)])

    # Every matrix that is multiplied with the tokens must have the further lines.
    longer_params = {
        name: longer(w, jnp.zeros((num_experts,) + w.shape[1:])) if w.shape[:1] == (d_model,) else w
        for name, w in params.items()
    }
    longer_params["gate"] = longer(params["gate"], NEVER * jnp.eye(num_experts))
    # A barred token-expert pair has a 1 among the further features, all others a 0.
    barred_TE = _of_tokens(barred_bE, tokens).astype(tokens.x_TD.dtype)
    x_TD = jnp.concatenate([tokens.x_TD, barred_TE], 1)
    return longer_params, tokens._replace(x_TD=x_TD)


def remove(routing: Routing | Slots, removed_bE: jax.Array, tokens: Tokens) -> Routing | Slots:
    """Returns the routing without the removed experts of each row.

    Their assignments go nowhere, and the other gates stay as they are.
    """
    num_experts = removed_bE.shape[1]
    removed_TE = _of_tokens(removed_bE, tokens)
    if not isinstance(routing, Routing):
        num_groups, group_tokens = routing.combine_GtEp.shape[:2]
        removed_GtE1 = removed_TE.reshape(num_groups, group_tokens, num_experts, 1)
        # The slots of a removed expert are still computed, and weigh nothing.
        return routing._replace(combine_GtEp=jnp.where(removed_GtE1, 0, routing.combine_GtEp))
    pair_N = (routing.token_N, routing.expert_index_N)
    is_removed_N = removed_TE.at[pair_N].get(mode="fill", fill_value=False)
    return routing._replace(
        expert_index_N=jnp.where(is_removed_N, num_experts, routing.expert_index_N),
        gate_N=jnp.where(is_removed_N, 0, routing.gate_N),
    )


def _of_tokens(mask_bE: jax.Array, tokens: Tokens) -> jax.Array:
    """Returns the mask of its row for each token, [T, E]."""
    row_length = tokens.valid_T.shape[0] // tokens.num_rows
    return jnp.repeat(mask_bE, row_length, 0)
