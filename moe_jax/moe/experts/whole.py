"""The experts' network as products over all rows at once, for kernels that know of groups.

Shapes: see network.py; X, Y either width of a weight.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.moe.experts import narrow
from moe_jax.moe.experts.narrow import Rounded
from moe_jax.moe.experts.network import Biases, Layout, Rows
from moe_jax.precision import wide_dtype


class Products(NamedTuple):
    """The three products of a kernel. What they leave in rows of nobody is undefined."""

    # (a_RX, w_eXY) -> a @ w [R, Y]; of narrow numbers their sums, as narrow.py adds them up
    product: Callable[[Array, Array], Array]
    # (b_RY, w_eXY) -> b @ w^T [R, X]
    transposed: Callable[[Array, Array], Array]
    # (a_RX, b_RY) -> a^T @ b of each expert's rows [e, X, Y], in the wide dtype; in rows of nobody
    # b is zero and a finite
    outer: Callable[[Array, Array], Array]


def products_of(product: Callable[..., Array], outer: Callable[..., Array], *how: Any) -> Products:
    """Returns the products of a kernel that has `product(a_RX, w_eXY, transposed, *how)`, with w^T
    where it says so, and `outer(a_RX, b_RY, *how)`.
    """

    def plain(a_RX: Array, w_eXY: Array) -> Array:
        return product(a_RX, w_eXY, False, *how)

    def transposed(b_RY: Array, w_eXY: Array) -> Array:
        return product(b_RY, w_eXY, True, *how)

    def of_rows(a_RX: Array, b_RY: Array) -> Array:
        return outer(a_RX, b_RY, *how)

    return Products(plain, transposed, of_rows)


def of_experts(layout: Layout, num_rows: int) -> Array:
    """Returns whether each row is that of each expert [R, e]: products with it take the place of
    gathers and scatters of biases.
    """
    start_e, size_e = layout
    row_R1 = jnp.arange(num_rows, dtype=start_e.dtype)[:, None]
    return (row_R1 >= start_e[None]) & (row_R1 < (start_e + size_e)[None])


def is_own(layout: Layout, num_rows: int) -> Array:
    """Returns which rows are somebody's [R, 1]."""
    return jnp.any(of_experts(layout, num_rows), axis=1, keepdims=True)


def times(products: Products, a_RX: Array, w_eXY: Array | Rounded, layout: Layout) -> Array:
    """Returns a @ w of every expert's rows."""
    if not isinstance(w_eXY, Rounded):
        return products.product(a_RX, w_eXY)
    a = narrow.like(a_RX, 1, w_eXY)
    sums_RY = products.product(a.values, w_eXY.values).astype(a.scale.dtype)
    # A gather: a product with `of_experts` would round the scales on a TPU.
    expert_R = jnp.argmax(of_experts(layout, a_RX.shape[0]), axis=1)
    columns_RY = w_eXY.scale[:, 0][expert_R]
    return (sums_RY * a.scale * columns_RY).astype(a_RX.dtype)


def forward(
    act: Callable[[Array], Array], products: Products, rows: Rows, layout: Layout
) -> tuple[Array, Array]:
    """Returns (y_RD, pre_RH): the results, and the pre-activations that the backward pass reads."""
    x_RD, gate_R, w_in_eDH, w_out_eFD, biases = rows
    dtype = x_RD.dtype
    wide = wide_dtype(dtype)
    pre_RH = times(products, x_RD, w_in_eDH.astype(dtype), layout)
    is_of_Re = of_experts(layout, x_RD.shape[0]).astype(dtype)
    if biases is not None:
        # Each row gets the bias of its expert.
        pre_RH = pre_RH + is_of_Re @ biases.in_eH.astype(dtype)
    gate_R1 = gate_R.astype(wide)[:, None]
    hidden_RF = (act(pre_RH.astype(wide)) * gate_R1).astype(dtype)
    y_RD = times(products, hidden_RF, w_out_eFD.astype(dtype), layout)
    if biases is not None:
        y_RD = y_RD + gate_R1.astype(dtype) * (is_of_Re @ biases.out_eD.astype(dtype))
    return jnp.where(is_own(layout, x_RD.shape[0]), y_RD, 0), pre_RH


def backward(
    act: Callable[[Array], Array],
    products: Products,
    rows: Rows,
    layout: Layout,
    pre_RH: Array,
    dy_RD: Array,
) -> Rows:
    """Returns the cotangents of the rows from that of y; `backward_rows` has the equations."""
    x_RD, gate_R, w_in_eDH, w_out_eFD, biases = rows
    dtype = x_RD.dtype
    wide = wide_dtype(dtype)
    is_own_R1 = is_own(layout, x_RD.shape[0])

    def own(array_RX: Array) -> Array:
        return jnp.where(is_own_R1, array_RX, 0)

    # What is zero in rows of nobody leaves a sum over rows alone, where the rest is finite.
    dy_RD = own(dy_RD)
    gate_R1 = gate_R.astype(wide)[:, None]
    h_RF, pull_act = jax.vjp(act, own(pre_RH).astype(wide))
    # The two cotangents of w_out's product: of h * gate, and of w_out by `outer` below.
    hidden_RF = (h_RF * gate_R1).astype(dtype)
    dh_gated_RF = own(products.transposed(dy_RD, w_out_eFD.astype(dtype))).astype(wide)
    (dpre_RH,) = pull_act(dh_gated_RF * gate_R1)
    dpre_RH = dpre_RH.astype(dtype)
    dx_RD = own(products.transposed(dpre_RH, w_in_eDH.astype(dtype)))
    dgate_R, dbiases = jnp.sum(dh_gated_RF * h_RF, axis=-1), None
    if biases is not None:
        is_of_Re = of_experts(layout, x_RD.shape[0]).astype(wide)
        dy_wide_RD = dy_RD.astype(wide)
        dgate_R = dgate_R + jnp.sum(dy_wide_RD * (is_of_Re @ biases.out_eD.astype(wide)), axis=-1)
        dbiases = Biases(
            (is_of_Re.T @ dpre_RH.astype(wide)).astype(biases.in_eH.dtype),
            (is_of_Re.T @ (dy_wide_RD * gate_R1)).astype(biases.out_eD.dtype),
        )
    return Rows(
        dx_RD,
        dgate_R.astype(gate_R.dtype),
        products.outer(x_RD, dpre_RH).astype(w_in_eDH.dtype),
        products.outer(hidden_RF, dy_RD).astype(w_out_eFD.dtype),
        dbiases,
    )
