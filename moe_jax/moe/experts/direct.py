"""The experts' network on few tokens, as when a text is written: no buffer.

What then takes time is reading the weights, and what prepares the grouped product. Two ways, by
sizes that are known when it is compiled:

- As many assignments as experts, or more: nearly all weights are read anyway, in one product of all
  experts. Each has places for twice its share of the assignments. Where there are no more tokens
  than places, or one expert has more rows than places, every expert computes every token, with the
  weight 0 for those that did not choose it.
- Fewer: one assignment after another, which reads the weights of the chosen experts alone.

Measured alone on two busy cores of an Intel Xeon, K = 2, D = 256, F = 512: at E = 8 0.7 of the
time of the grouped product for 1 token, 0.4 for 4 and 0.5 for 8; at E = 64 0.5 for 1 and for 4.
A step of decoding with 8 experts took 0.84 of the time with 16 tokens, 0.86 with 32, 0.90 with 64.

Shapes: see network.py; T tokens, M assignments, C places of an expert, N = e C.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.moe.experts.network import Chosen
from moe_jax.moe.ranks import rank_in
from moe_jax.parallel.varying import vary_alike
from moe_jax.precision import wide_dtype

# Beyond these the grouped product is as fast.
MOST_TOKENS = 64
MOST_ASSIGNMENTS = 16
# A product of fewer rows takes as long.
LEAST_PLACES = 8


class Few(NamedTuple):
    """Holds few tokens, their assignments and the weights of the experts of this device."""

    x_TD: Array
    token_M: Array
    expert_index_M: Array
    gate_M: Array
    # Gate and value of a hidden unit, where there are both, are two of the H columns.
    w_in_eDH: Array
    w_out_eFD: Array


def is_faster(num_tokens: int, num_assignments: int, num_experts: int) -> bool:
    """Returns whether so few tokens are computed faster than by the grouped product."""
    if num_assignments >= num_experts:
        return num_tokens <= MOST_TOKENS
    return num_assignments <= MOST_ASSIGNMENTS


def direct_ffn(
    x_TD: Array,
    token_M: Array,
    expert_index_M: Array,
    gate_M: Array,
    w_in_eDPF: Array,
    w_out_eFD: Array,
    *,
    chosen: Chosen,
) -> Array:
    """Returns y_TD, for each token the sum over its assignments of
    (activation(x @ w_in[i]) * gate) @ w_out[i].

    An assignment of expert number e or more is of no expert here, and adds nothing.
    """
    num_experts, d_model, _, _ = w_in_eDPF.shape
    w_in_eDH = w_in_eDPF.reshape(num_experts, d_model, -1).astype(x_TD.dtype)
    w_out_eFD = w_out_eFD.astype(x_TD.dtype)
    # As many assignments as experts: nearly all weights are read anyway.
    run = _by_places if token_M.shape[0] >= num_experts else _one_by_one
    alike = vary_alike(x_TD, token_M, expert_index_M, gate_M, w_in_eDH, w_out_eFD)
    return run(chosen.function(), Few(*alike))


def _by_places(act: Callable[[Array], Array], few: Few) -> Array:
    """Returns y_TD: every expert computes as many rows, unless one of them has more."""
    x_TD, token_M, expert_index_M, gate_M, w_in_eDH, w_out_eFD = few
    num_tokens, num_experts = x_TD.shape[0], w_in_eDH.shape[0]
    num_places = places(token_M.shape[0], num_experts)
    if num_places >= num_tokens:
        return _every_expert(act, few)
    wide = wide_dtype(x_TD.dtype)
    # Those of no expert here are a class of their own, behind the last expert.
    class_M = jnp.minimum(expert_index_M, num_experts)
    place_M, count, _ = rank_in(class_M, num_experts + 1)
    most = count[:num_experts].max()

    def in_places() -> Array:
        # Behind the last expert nothing is written.
        row_M = class_M * num_places + place_M
        zero_N = jnp.zeros_like(gate_M, shape=(num_experts * num_places,), dtype=wide)
        gate_N = zero_N.at[row_M].set(gate_M.astype(wide), mode="drop")
        # A place that nobody takes computes token 0, and adds none of it.
        token_N = zero_N.astype(token_M.dtype).at[row_M].set(token_M, mode="drop")
        x_eCD = x_TD[token_N].reshape(num_experts, num_places, -1)
        pre_eCH = jnp.einsum("eCD,eDH->eCH", x_eCD, w_in_eDH)
        hidden_eCF = act(pre_eCH.astype(wide)) * gate_N.reshape(num_experts, num_places, 1)
        hidden_eCF = hidden_eCF.astype(x_TD.dtype)
        y_eCD = jnp.einsum("eCF,eFD->eCD", hidden_eCF, w_out_eFD, preferred_element_type=wide)
        y_ND = y_eCD.reshape(token_N.shape[0], -1)
        y_TD = jnp.zeros_like(x_TD, dtype=wide).at[token_N].add(y_ND)
        return y_TD.astype(x_TD.dtype)

    return lax.cond(most <= num_places, in_places, lambda: _every_expert(act, few))


def places(num_assignments: int, num_experts: int) -> int:
    """Returns the rows that an expert computes at once: a power of two, of twice its share."""
    share = -(-num_assignments // num_experts)
    return max(LEAST_PLACES, 1 << (2 * share - 1).bit_length())


def _every_expert(act: Callable[[Array], Array], few: Few) -> Array:
    """Returns y_TD: every expert computes every token, and the gates choose."""
    x_TD, token_M, expert_index_M, gate_M, w_in_eDH, w_out_eFD = few
    num_tokens, num_experts = x_TD.shape[0], w_in_eDH.shape[0]
    wide = wide_dtype(x_TD.dtype)
    # The gate of each token at each expert; an expert that is not here is dropped.
    zero_Te = jnp.zeros_like(gate_M, shape=(num_tokens, num_experts), dtype=wide)
    gate_Te = zero_Te.at[token_M, expert_index_M].add(gate_M.astype(wide), mode="drop")
    x_eTD = jnp.broadcast_to(x_TD, (num_experts, *x_TD.shape))
    pre_eTH = jnp.einsum("eTD,eDH->eTH", x_eTD, w_in_eDH)
    hidden_eTF = act(pre_eTH.astype(wide)) * gate_Te.T[:, :, None]
    # The sum over experts is part of one product over all hidden units of all experts.
    hidden_TeF = jnp.swapaxes(hidden_eTF.astype(x_TD.dtype), 0, 1)
    hidden_TU = hidden_TeF.reshape(num_tokens, -1)
    w_out_UD = w_out_eFD.reshape(hidden_TU.shape[1], -1)
    return hidden_TU @ w_out_UD


def _one_by_one(act: Callable[[Array], Array], few: Few) -> Array:
    """Returns y_TD: one assignment after another, which reads the chosen experts alone."""
    x_TD, token_M, expert_index_M, gate_M, w_in_eDH, w_out_eFD = few
    num_experts = w_in_eDH.shape[0]
    wide = wide_dtype(x_TD.dtype)
    gate_M = jnp.where(expert_index_M < num_experts, gate_M, 0).astype(wide)
    # An index behind the last expert would be that of the last one: its gate is 0.
    expert_index_M = jnp.minimum(expert_index_M, num_experts - 1)

    def add(m: Array, y_TD: Array) -> Array:
        i, t = expert_index_M[m], token_M[m]
        x_1D = lax.dynamic_slice_in_dim(x_TD, t, 1)
        pre_1H = x_1D @ w_in_eDH[i]
        hidden_1F = act(pre_1H.astype(wide)) * gate_M[m]
        y_1D = hidden_1F.astype(x_TD.dtype) @ w_out_eFD[i]
        # A token may have come before, with another expert.
        before_1D = lax.dynamic_slice_in_dim(y_TD, t, 1)
        return lax.dynamic_update_slice_in_dim(y_TD, before_1D + y_1D, t, 0)

    return jax.lax.fori_loop(0, token_M.shape[0], add, jnp.zeros_like(x_TD))
