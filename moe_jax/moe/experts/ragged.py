"""The experts' kernel for every platform but CPUs: `jax.lax.ragged_dot`.

On a CPU it costs E times the useful work (blocks.py has the kernel there).

Shapes: see network.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.moe.experts.network import Biases, Layout, Rows
from moe_jax.precision import wide_dtype


def _groups(layout: Layout, num_rows: int) -> tuple[Array, Array]:
    """Returns (group sizes for `ragged_dot` [e], which rows are somebody's [R])."""
    start_e, size_e = layout
    # Groups of ragged_dot have no gaps: a gap goes to the expert before it. The end of the buffer
    # goes to nobody.
    last_end = start_e[-1:] + size_e[-1:]
    end_e = jnp.concatenate([start_e[1:], last_end])
    group_size_e = jnp.diff(end_e, prepend=jnp.zeros_like(end_e[:1]))
    return group_size_e, jnp.any(_of_experts(layout, num_rows), axis=1)


def _of_experts(layout: Layout, num_rows: int) -> Array:
    """Returns whether each row is that of each expert [R, e]: products with it take the place of
    gathers and scatters.
    """
    row_R1 = jnp.arange(num_rows, dtype=layout.start_e.dtype)[:, None]
    end_e = layout.start_e + layout.size_e
    return (row_R1 >= layout.start_e[None]) & (row_R1 < end_e[None])


def forward(act: Callable[[Array], Array], rows: Rows, layout: Layout) -> tuple[Array, Array]:
    """Returns (y_RD, pre_RH): the results, and the pre-activations that the backward pass reads."""
    x_RD, gate_R, w_in_eDH, w_out_eFD, biases = rows
    dtype = x_RD.dtype
    wide = wide_dtype(dtype)
    group_size_e, is_own_R = _groups(layout, x_RD.shape[0])
    pre_RH = lax.ragged_dot(x_RD, w_in_eDH.astype(dtype), group_size_e)
    is_of_Re = _of_experts(layout, x_RD.shape[0]).astype(dtype)
    if biases is not None:
        pre_RH = pre_RH + is_of_Re @ biases.in_eH.astype(dtype)
    gate_R1 = gate_R.astype(wide)[:, None]
    hidden_RF = (act(pre_RH.astype(wide)) * gate_R1).astype(dtype)
    y_RD = lax.ragged_dot(hidden_RF, w_out_eFD.astype(dtype), group_size_e)
    if biases is not None:
        y_RD = y_RD + gate_R1.astype(dtype) * (is_of_Re @ biases.out_eD.astype(dtype))
    return jnp.where(is_own_R[:, None], y_RD, 0), pre_RH


def backward(
    act: Callable[[Array], Array], rows: Rows, layout: Layout, pre_RH: Array, dy_RD: Array
) -> Rows:
    """Returns the cotangents of the rows from that of y; `blocks.backward` has the equations."""
    x_RD, gate_R, w_in_eDH, w_out_eFD, biases = rows
    dtype = x_RD.dtype
    wide = wide_dtype(dtype)
    group_size_e, is_own_R = _groups(layout, x_RD.shape[0])

    def own(array_RX: Array) -> Array:
        # Past the last group a platform may leave anything.
        return jnp.where(is_own_R[:, None], array_RX, 0)

    def matmul(a_RX: Array, w_eXY: Array) -> Array:
        return lax.ragged_dot(a_RX, w_eXY.astype(dtype), group_size_e)

    gate_R1 = gate_R.astype(wide)[:, None]
    h_RF, pull_act = jax.vjp(act, own(pre_RH).astype(wide))
    hidden_RF = (h_RF * gate_R1).astype(dtype)
    _, pull_out = jax.vjp(matmul, hidden_RF, w_out_eFD)
    _, pull_in = jax.vjp(matmul, x_RD, w_in_eDH)
    dh_gated_RF, dw_out_eFD = pull_out(dy_RD)
    dh_gated_RF = own(dh_gated_RF).astype(wide)
    (dpre_RH,) = pull_act(dh_gated_RF * gate_R1)
    dx_RD, dw_in_eDH = pull_in(dpre_RH.astype(dtype))
    dgate_R = jnp.sum(dh_gated_RF * h_RF, axis=-1)
    dbiases = None
    if biases is not None:
        is_of_Re = _of_experts(layout, x_RD.shape[0]).astype(wide)
        dy_wide_RD = own(dy_RD).astype(wide)
        dgate_R = dgate_R + jnp.sum(dy_wide_RD * (is_of_Re @ biases.out_eD.astype(wide)), axis=-1)
        dbiases = Biases(
            (is_of_Re.T @ own(dpre_RH)).astype(biases.in_eH.dtype),
            (is_of_Re.T @ (dy_wide_RD * gate_R1)).astype(biases.out_eD.dtype),
        )
    return Rows(own(dx_RD), dgate_R.astype(gate_R.dtype), dw_in_eDH, dw_out_eFD, dbiases)
