"""The feed-forward network of an expert, and what the kernels that compute it are given.

    y = gate * (activation(x @ w_in + in_bias) @ w_out + out_bias)

Shapes: R rows of all experts, B rows of some, e experts on this device, D model, F expert hidden, P
parts of the first weight (2: gate and up, 1 otherwise), H = P * F pre-activations of a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.moe.activations import ACTIVATIONS
from moe_jax.moe.experts import narrow
from moe_jax.moe.experts.narrow import Rounded
from moe_jax.precision import wide_dtype


class Chosen(NamedTuple):
    """An activation and its options: what decides the function, and may be compared."""

    activation: str
    # None = the defaults.
    options: Any = None

    @property
    def parts(self) -> int:
        return ACTIVATIONS[self.activation].parts

    def function(self) -> Callable[[Array], Array]:
        """Returns the activation as a function of pre-activations [B, H], whose parts stand side by
        side.
        """
        kind = ACTIVATIONS[self.activation]
        options = kind.options() if self.options is None else self.options

        def act(pre_BH: Array) -> Array:
            return kind.of(options, *jnp.split(pre_BH, kind.parts, axis=-1))

        return act


class Biases(NamedTuple):
    """Holds the biases of both layers of the local experts."""

    in_eH: Array
    out_eD: Array


class Rows(NamedTuple):
    """Holds what a kernel works on; cotangents have the same structure.

    Forward, weights may be rounded to narrow numbers.
    """

    x_RD: Array
    gate_R: Array
    w_in_eDH: Any
    w_out_eFD: Any
    # None = without.
    biases: Biases | None = None


class KernelSizes(NamedTuple):
    """What the padding of a kernel depends on, of one device."""

    num_experts: int
    # Of `expert_ffn`; the larger one is near the mean load.
    block: tuple[int, int]
    # R, of the buffer.
    num_rows: int
    # Numbers in the matrices of one expert.
    num_weights: int


class Case(NamedTuple):
    """What a kernel may ask before it is compiled, of one device."""

    # Of the rows.
    dtype: Any
    # D and F.
    widths: tuple[int, int]
    # Of `expert_ffn`.
    block: tuple[int, int]
    # R, of the buffer.
    num_rows: int
    # The weights are rounded to narrow numbers.
    is_narrow: bool


class Layout(NamedTuple):
    """Says where the rows of each expert are: [start, start + size)."""

    start_e: Array
    size_e: Array


def dot(a: Array, b: Array, dim_a: int, dim_b: int, dtype: Any) -> Array:
    """Contracts dimension `dim_a` of matrix a with `dim_b` of matrix b."""
    return lax.dot_general(a, b, (((dim_a,), (dim_b,)), ((), ())), preferred_element_type=dtype)


def times(a_BX: Array, w_XY: Array | Rounded, dtype: Any) -> Array:
    """Returns a @ w."""
    if isinstance(w_XY, Rounded):
        return narrow.times(a_BX, w_XY, dtype)
    return dot(a_BX, w_XY, 1, 0, dtype)


def forward_rows(
    act: Callable[[Array], Array],
    x_BD: Array,
    gate_B: Array,
    w_in_DH: Array | Rounded,
    w_out_FD: Array | Rounded,
    biases: Biases | None = None,
) -> tuple[Array, Array]:
    """Returns (y_BD, pre_BH) of rows of one expert, whose biases are vectors here."""
    dtype = x_BD.dtype
    wide = wide_dtype(dtype)
    # Products are in the dtype of x; the activation between them is computed in a wide one.
    # Gate and up are one product, side by side in H.
    pre_BH = times(x_BD, w_in_DH, dtype)
    if biases is not None:
        pre_BH = pre_BH + biases.in_eH.astype(dtype)[None]
    gate_B1 = gate_B.astype(wide)[:, None]
    # gate * (h @ w_out) = (gate * h) @ w_out.
    hidden_BF = (act(pre_BH.astype(wide)) * gate_B1).astype(dtype)
    y_BD = times(hidden_BF, w_out_FD, dtype)
    if biases is not None:
        y_BD = y_BD + gate_B1.astype(dtype) * biases.out_eD.astype(dtype)[None]
    return y_BD, pre_BH


def backward_rows(
    act: Callable[[Array], Array],
    rows: Rows,
    pre_BH: Array,
    dy_BD: Array,
    outer: Callable[[Array, Array, Any], Array],
) -> Rows:
    """Returns the cotangents of rows of one expert, of its weights [D, H], [F, D] and its biases.

    Where dy is zero all of them are. `outer(a_BX, b_BY, dtype)` is a^T @ b. With h = act(pre) and
    y = (h * gate) @ w_out:

        dh' = dy @ w_out^T             the cotangent of h * gate
        dgate = sum over F of dh' * h
        dpre = pull of act by dh' * gate
        dx = dpre @ w_in^T,  dw_in = x^T @ dpre,  dw_out = (h * gate)^T @ dy

    and with biases y = ... + gate * out_bias, so that din_bias is the sum of dpre over rows,
    dout_bias that of gate * dy, and dgate has dy . out_bias too.
    """
    x_BD, gate_B, w_in_DH, w_out_FD, biases = rows
    dtype = x_BD.dtype
    wide = wide_dtype(dtype)
    dh_gated_BF = dot(dy_BD, w_out_FD, 1, 1, wide)
    gate_B1 = gate_B.astype(wide)[:, None]
    # The activation once more, and its pullback: only pre-activations were kept.
    h_BF, pull = jax.vjp(act, pre_BH.astype(wide))
    (dpre_BH,) = pull(dh_gated_BF * gate_B1)
    dpre_BH = dpre_BH.astype(dtype)
    hidden_BF = (h_BF * gate_B1).astype(dtype)
    dgate_B = jnp.sum(dh_gated_BF * h_BF, axis=-1)
    dbiases = None
    if biases is not None:
        dy_wide_BD = dy_BD.astype(wide)
        dgate_B = dgate_B + dy_wide_BD @ biases.out_eD.astype(wide)
        din_H = jnp.sum(dpre_BH, axis=0, dtype=wide)
        dbiases = Biases(din_H, jnp.sum(dy_wide_BD * gate_B1, axis=0))
    return Rows(
        dot(dpre_BH, w_in_DH, 1, 1, dtype),
        dgate_B,
        outer(x_BD, dpre_BH, wide),
        outer(hidden_BF, dy_BD, wide),
        dbiases,
    )


def of_expert(biases: Biases | None, i: Array) -> Biases | None:
    """Returns the biases of one expert; None without."""
    return jax.tree.map(lambda bias: bias[i], biases)
