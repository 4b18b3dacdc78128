"""The feed-forward network of an expert, and what the kernels that compute it are given.

    y = (activation(x @ w_in) * gate) @ w_out

Shapes: R rows of all experts, B rows of some, e experts on this device, D model, F expert hidden, P
parts of the first weight (2: gate and up, 1 otherwise), H = P * F pre-activations of a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.precision import wide_dtype


def swiglu(pre_BH: Array) -> Array:
    """Returns silu(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 6).

    `pre_BH` holds the gate in its first half and up in its second.
    """
    gate_BF, up_BF = jnp.split(pre_BH, 2, axis=-1)
    return jax.nn.silu(gate_BF) * up_BF


def gelu(pre_BH: Array) -> Array:
    """Returns GELU in its tanh approximation."""
    return jax.nn.gelu(pre_BH)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"swiglu": swiglu, "gelu": gelu}
PARTS = {"swiglu": 2, "gelu": 1}


class Rows(NamedTuple):
    """Holds what a kernel works on; cotangents have the same structure."""

    x_RD: Array
    gate_R: Array
    w_in_eDH: Array
    w_out_eFD: Array


class Layout(NamedTuple):
    """Says where the rows of each expert are: [start, start + size)."""

    start_e: Array
    size_e: Array


def dot(a: Array, b: Array, dim_a: int, dim_b: int, dtype: Any) -> Array:
    """Contracts dimension `dim_a` of matrix a with `dim_b` of matrix b."""
    return lax.dot_general(a, b, (((dim_a,), (dim_b,)), ((), ())), preferred_element_type=dtype)


def forward_rows(
    act: Callable[[Array], Array], x_BD: Array, gate_B: Array, w_in_DH: Array, w_out_FD: Array
) -> tuple[Array, Array]:
    """Returns (y_BD, pre_BH) of rows of one expert."""
    dtype = x_BD.dtype
    wide = wide_dtype(dtype)
    pre_BH = dot(x_BD, w_in_DH, 1, 0, dtype)
    gate_B1 = gate_B.astype(wide)[:, None]
    hidden_BF = (act(pre_BH.astype(wide)) * gate_B1).astype(dtype)
    return dot(hidden_BF, w_out_FD, 1, 0, dtype), pre_BH


def backward_rows(
    act: Callable[[Array], Array],
    rows: Rows,
    pre_BH: Array,
    dy_BD: Array,
    outer: Callable[[Array, Array, Any], Array],
) -> Rows:
    """Returns the cotangents of rows of one expert and of its weights [D, H], [F, D].

    Where dy is zero all of them are. `outer(a_BX, b_BY, dtype)` is a^T @ b. With h = act(pre) and
    y = (h * gate) @ w_out:

        dh' = dy @ w_out^T             the cotangent of h * gate
        dgate = sum over F of dh' * h
        dpre = pull of act by dh' * gate
        dx = dpre @ w_in^T,  dw_in = x^T @ dpre,  dw_out = (h * gate)^T @ dy
    """
    x_BD, gate_B, w_in_DH, w_out_FD = rows
    dtype = x_BD.dtype
    wide = wide_dtype(dtype)
    dh_gated_BF = dot(dy_BD, w_out_FD, 1, 1, wide)
    gate_B1 = gate_B.astype(wide)[:, None]
    h_BF, pull = jax.vjp(act, pre_BH.astype(wide))
    (dpre_BH,) = pull(dh_gated_BF * gate_B1)
    dpre_BH = dpre_BH.astype(dtype)
    hidden_BF = (h_BF * gate_B1).astype(dtype)
    return Rows(
        dot(dpre_BH, w_in_DH, 1, 1, dtype),
        jnp.sum(dh_gated_BF * h_BF, axis=-1),
        outer(x_BD, dpre_BH, wide),
        outer(hidden_BF, dy_BD, wide),
    )
