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

NAME = "record/"  # what the names of a record begin with, among the sums of a layer
ROUTING = {
    "routing": ()
}  # `Request.record`: a dict with empty values is a pytree without leaves, so it is static
INPUTS = {"routing": (), "inputs": ()}  # also the activations that the router reads
GATES = {"gates": ()}  # what weighs the experts' outputs, for a proof: see `gates`


class Request(NamedTuple):
    """Holds what instruments ask of an MoE layer; () in a field = nothing.

    The arrays of one layer are [B, ...]. A model takes those of all M blocks, [M, B, ...], and a
    batch of text has them as [B, M, ...], so that micro-batches split its rows.
    """

    recorded: Any = ()  # (experts [B, S, K], gates [B, S, K]) that the router "recorded" replays
    removed: Any = ()  # bool [B, E]: experts whose assignments go nowhere
    barred: Any = ()  # bool [B, E]: experts that the router must go round
    record: Any = ()  # what to return of each token: ROUTING, INPUTS or GATES


def record(
    routing: Routing | Slots,
    dropped_N: jax.Array,
    tokens: Tokens,
    wanted: Mapping[str, Any],
    num_experts: int,
):
    """Returns of this device {"expert" (int32, E = nowhere), "gate", "dropped":

    [b, S, K]; "input": [b, S, D]}, as `wanted`.

    The routing is the router's, and "dropped" what ordering or dispatcher make of it. What the
    router never lists (ReLU's overflow) is not in it. A router without a fixed number of choices is
    recorded with K = E places, place e for expert e. UserError for a router that mixes tokens, as
    it makes no assignments, and for one whose null experts copy the token.
    """
    if not isinstance(routing, Routing):
        raise UserError(
            "a router that mixes tokens (soft MoE) makes no assignments that could be recorded"
        )
    if routing.copy_T is not None:
        raise UserError(
            "null experts that copy the token are no assignments: their weight cannot be recorded"
        )
    fields_TK = _per_token(routing, dropped_N, tokens.valid_T.shape[0], num_experts)
    if "inputs" in wanted:
        fields_TK["input"] = tokens.x_TD

    def by_row(z):
        return z.reshape((tokens.num_rows, -1) + z.shape[1:])

    return {NAME + name: by_row(z) for name, z in fields_TK.items()}


def gates(routing: Routing | Slots, tokens: Tokens, num_experts: int) -> dict[str, jax.Array]:
    """Returns what a dispatcher is given, as dense arrays of this device through which gradients
    reach the router: of a proof that computes the layer without any dispatcher.

    Of assignments, {"gate": [b, S, E], "copy": [b, S]}: y = sum over e of gate * expert_e(x), plus
    copy * x. Of mixtures, {"dispatch", "combine": [b, S, E, p]}, whose tokens are those of a group.
    """

    def by_row(z_T):
        return z_T.reshape((tokens.num_rows, -1) + z_T.shape[1:])

    if isinstance(routing, Routing):
        gate_TE = jnp.zeros_like(routing.gate_N, shape=(tokens.valid_T.shape[0], num_experts))
        at = (routing.token_N, routing.expert_index_N)
        # Assignments to nowhere have expert E, which is out of bounds.
        fields = {"gate": gate_TE.at[at].add(routing.gate_N, mode="drop")}
        copy_T = routing.copy_T
        fields["copy"] = jnp.zeros_like(gate_TE[:, 0]) if copy_T is None else copy_T
    else:
        weights = {"dispatch": routing.dispatch_GtEp, "combine": routing.combine_GtEp}
        fields = {name: z.reshape((-1,) + z.shape[2:]) for name, z in weights.items()}
    return {NAME + name: by_row(z) for name, z in fields.items()}


def _per_token(
    routing: Routing, dropped_N: jax.Array, num_tokens: int, num_experts: int
) -> dict[str, jax.Array]:
    fields = {"expert": routing.expert_index_N, "gate": routing.gate_N, "dropped": dropped_N}
    if routing.per_token:
        return {name: z.reshape(num_tokens, -1) for name, z in fields.items()}
    there_N = routing.expert_index_N < num_experts
    place = (routing.token_N, jnp.where(there_N, routing.expert_index_N, num_experts))

    def scatter(z_N):
        return jnp.zeros_like(z_N, shape=(num_tokens, num_experts)).at[place].set(z_N, mode="drop")

    chosen_TE = scatter(there_N)
    expert_TE = jnp.where(chosen_TE, jnp.arange(num_experts, dtype=jnp.int32)[None], num_experts)
    return {"expert": expert_TE, "gate": scatter(routing.gate_N), "dropped": scatter(dropped_N)}


def split(sums: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """(the sums of the layers, their record without the prefix)."""
    rest = {name: z for name, z in sums.items() if not name.startswith(NAME)}
    return rest, {name.removeprefix(NAME): z for name, z in sums.items() if name.startswith(NAME)}


def bar(
    params: Mapping[str, jax.Array], tokens: Tokens, barred_bE: jax.Array
) -> tuple[dict[str, jax.Array], Tokens]:
    """(params, tokens) with which a router of linear logits never chooses the barred experts of a
    row, whatever else it does.

    Each token carries the mask of its row as E further features, and each matrix has E further
    lines: NEVER on the gate's diagonal.
    """
    num_experts, width = barred_bE.shape[1], tokens.x_TD.shape[1]
    if params.get("gate", jnp.zeros(0)).shape != (width, num_experts):
        raise UserError(
            "only a router with a linear gate can be told to go round an expert: it has no logit "
            "to mask"
        )
    barred_TE = jnp.repeat(barred_bE, tokens.valid_T.shape[0] // tokens.num_rows, 0).astype(
        tokens.x_TD.dtype
    )

    def longer(w, below):
        return jnp.concatenate([w, below.astype(w.dtype)]) if w.shape[:1] == (width,) else w

    wide = {name: longer(w, jnp.zeros((num_experts,) + w.shape[1:])) for name, w in params.items()}
    wide["gate"] = longer(params["gate"], NEVER * jnp.eye(num_experts))
    return wide, tokens._replace(x_TD=jnp.concatenate([tokens.x_TD, barred_TE], 1))


def remove(routing: Routing | Slots, removed_bE: jax.Array, tokens: Tokens) -> Routing | Slots:
    """The routing without the removed experts of each row: their assignments go nowhere, and the
    other gates stay as they are.
    """
    num_experts = removed_bE.shape[1]
    removed_TE = jnp.repeat(removed_bE, tokens.valid_T.shape[0] // tokens.num_rows, 0)
    if not isinstance(routing, Routing):
        keep_GtE1 = ~removed_TE.reshape(routing.combine_GtEp.shape[:2] + (num_experts, 1))
        return routing._replace(combine_GtEp=jnp.where(keep_GtE1, routing.combine_GtEp, 0))
    gone_N = removed_TE.at[routing.token_N, routing.expert_index_N].get(
        mode="fill", fill_value=False
    )
    expert_index_N = jnp.where(gone_N, num_experts, routing.expert_index_N)
    return routing._replace(
        expert_index_N=expert_index_N, gate_N=jnp.where(gone_N, 0, routing.gate_N)
    )
