"""Dropless dispatch through a gather: all tokens of a level come to each of its devices.

A device works on the rows of its own experts, and a reduce-scatter brings the sums home.

Shapes: n devices of a level, T tokens of each, N assignments of each, M = n N, R rows of a round,
e experts of this device.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe.dispatch import dropless_rounds
from moe_jax.moe.dispatch.contract import Experts
from moe_jax.moe.dispatch.dropless_rounds import serve_in_rounds
from moe_jax.moe.dispatch.exchange import SAVED
from moe_jax.moe.dispatch.layout import Shape, assignment_of_row
from moe_jax.moe.dispatch.levels import Level
from moe_jax.moe.experts.gathers import sum_rows, take_rows
from moe_jax.moe.ranks import rank_in
from moe_jax.moe.routing.contract import Routing


class _Assignments(NamedTuple):
    """Holds the M assignments of the devices that gather, and where the local ones lie."""

    token_M: jax.Array
    # Counted on this device; e = the expert is another device's, or nowhere.
    local_index_M: jax.Array
    gate_M: jax.Array
    # The row of each local assignment in the layout of all of this device's rows. For an
    # assignment of another device's expert it is the end of the layout.
    row_M: jax.Array
    is_local_M: jax.Array
    # The first row of each local expert, and the number of its assignments.
    start_e: jax.Array
    size_e: jax.Array
    # The rows up to the end of the last local expert.
    num_needed: jax.Array


def apply(
    x_TD: jax.Array,
    routing: Routing,
    experts: Experts,
    shape: Shape,
    level: Level,
    *,
    num_rows: int,
    is_direct: bool,
) -> jax.Array:
    """Returns y_TD, [T, D]: of each token the weighted sum over its experts on this level.

    Args:
      level: the devices that gather.
      num_rows: the rows of a round.
      is_direct: so few tokens that they have no buffer, where the experts can do without.
    """
    block = dropless_rounds.block(shape)
    # 1. All n T tokens of the level and their M = n N assignments come to every device.
    with jax.named_scope("dispatch"):
        x_nTD, gathered = _gather(x_TD, routing, shape, level)
        # Named here, so that tokens do not travel again; the rows below are made of them.
        x_nTD = checkpoint_name(x_nTD, SAVED)

    def serve(x_nTD: jax.Array, gate_M: jax.Array, offset: Any, num_rows: int) -> jax.Array:
        """Returns the weighted results of the rows [offset, offset + num_rows) of the layout,
        summed per token.
        """
        with jax.named_scope("dispatch"):
            row_M, first_e, size_e = _window(gathered, offset, num_rows)
            assignment_R = assignment_of_row(row_M, num_rows)
            num_tokens = x_nTD.shape[0]
            # A void row gets the token n T, which is out of bounds: `take_rows` makes it zero.
            src_R = gathered.token_M.at[assignment_R].get(mode="fill", fill_value=num_tokens)
            # The gathered list is still in the order of tokens, K entries each: [n T, K].
            dest_TK = row_M.reshape(-1, shape.per_token) if shape.per_token else None
            x_RD = take_rows(x_nTD, src_R, dest_TK)
            gate_R = gate_M.at[assignment_R].get(mode="fill", fill_value=0)
        y_RD = experts.grouped(x_RD, gate_R, first_e, size_e, block)
        with jax.named_scope("combine"):
            return sum_rows(y_RD, dest_TK, src_R, num_tokens)

    # 2. The rows of the local experts are served.
    if is_direct and experts.direct:
        y_nTD = experts.direct(x_nTD, gathered.token_M, gathered.local_index_M, gathered.gate_M)
    else:
        num_needed = gathered.num_needed
        y_nTD = serve_in_rounds(serve, x_nTD, gathered.gate_M, num_needed, shape, num_rows)
    # 3. Each device has the sums over its own experts, for all n T tokens: they are added up over
    # the level, and each device keeps its T tokens.
    with jax.named_scope("combine"):
        return level.scatter(y_nTD)


def _gather(
    x_TD: jax.Array, routing: Routing, shape: Shape, level: Level
) -> tuple[jax.Array, _Assignments]:
    """Returns the tokens of all devices of a level, in the order of its devices, and their
    assignments.
    """
    device = level.place()
    # Numbered over the whole level, as the gathered tokens lie.
    token_N = routing.token_N + device.astype(jnp.int32) * x_TD.shape[0]
    x_nTD, token_M = level.gather(x_TD), level.gather(token_N)
    expert_index_M, gate_M = level.gather(routing.expert_index_N), level.gather(routing.gate_N)

    # Local experts are numbered from 0; those of other devices, and nowhere, are number e.
    e = shape.local_experts
    local_index_M = expert_index_M - device * e
    local_index_M = jnp.where((local_index_M >= 0) & (local_index_M < e), local_index_M, e)
    is_local_M = local_index_M < e
    rank_M, count, _ = rank_in(local_index_M, e + 1)
    # The last class, e, is that of all others.
    size_e = count[:e]

    start_e, num_needed = dropless_rounds.rooms(size_e, shape)
    start_M = start_e.at[local_index_M].get(mode="fill", fill_value=0)
    row_M = jnp.where(is_local_M, start_M + rank_M, dropless_rounds.worst(shape))
    return x_nTD, _Assignments(
        token_M, local_index_M, gate_M, row_M, is_local_M, start_e, size_e, num_needed
    )


def _window(
    gathered: _Assignments, offset: Any, num_rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (row_M, first_e, size_e) of the rows [offset, offset + num_rows), counted from 0.

    The row of an assignment that lies outside is num_rows.
    """
    row_M = gathered.row_M
    # The last window may reach past the end of the layout, where the row of everything that is not
    # local lies.
    is_inside_M = (row_M >= offset) & (row_M < offset + num_rows) & gathered.is_local_M
    # An expert whose rows lie in two windows has a part in both, and an empty range in all others.
    # Windows begin at whole small blocks, so starts stay multiples of them.
    first_e, size_e = dropless_rounds.part(gathered.start_e, gathered.size_e, offset, num_rows)
    return jnp.where(is_inside_M, row_M - offset, num_rows), first_e, size_e
