"""The experts' kernel for CPUs: the rows of each expert in blocks of a few static sizes.

It visits the experts that have rows one after another with their weights held (one copy of the
weights per expert), and runs over the rows of each with trip counts known only at run time. Such
loops have no derivative, so the backward pass is written out.

Shapes: see network.py; B rows of a block.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.moe.experts.network import Layout, Rows, backward_rows, forward_rows, of_expert
from moe_jax.parallel.zeros import own_zeros
from moe_jax.precision import wide_dtype

# Rows of a block of this kernel, and of the large block that other kernels cut their tiles from.
MOST_ROWS, MOST_LARGE = 1024, 8192


def block_sizes(rows_mean: float) -> tuple[int, int]:
    """Returns the (large, small) block for a mean number of rows per expert.

    A large block near the mean serves most experts in one or two steps, the small one bounds the
    padding. Of a large block beyond MOST_ROWS this kernel takes as many. Measured at 2048 and 4096
    tokens, K = 2, D = 128 and 256, E = 8 and 64: no other choice was better by more than the noise.
    """
    # The power of two that is nearest to the mean, from 8 to 1024.
    exponent = round(math.log2(max(rows_mean, 1.0)))
    large = min(2 ** max(exponent, 3), MOST_LARGE)
    if large > 256:
        return large, min(large, MOST_ROWS) // 16
    return large, 16 if large > 16 else 8


def _sizes_between(block: tuple[int, int]) -> tuple[int, ...]:
    """Returns the static block sizes, largest first."""
    large, small = min(block[0], MOST_ROWS), block[1]
    # One between the two given saves many small steps.
    middle = small * math.isqrt(large // small)
    return tuple(sorted({large, middle, small}, reverse=True))


def _for_blocks(
    step: Callable[..., Any],
    carry: Any,
    start: Array,
    size: Array,
    num_rows: int,
    block: tuple[int, int],
) -> Any:
    """Folds `step(carry, offset, B)` over blocks that cover [start, start + size) in order.

    A block may reach past the rows by up to a quarter of itself, into rows of later experts: a few
    masked rows cost less than another round over the weights. So steps must mask, and what they
    write there must be overwritten by those experts' own steps, which come later. `num_rows` (R)
    keeps blocks inside the buffer.
    """
    end = start + size
    for B in _sizes_between(block):
        if B > num_rows:
            continue
        rows_left = jnp.maximum(end - start, 0)
        # The smallest block takes all that is left, a larger one what fills three quarters of it.
        slack = B - 1 if B == block[1] else B // 4
        num_blocks = jnp.minimum((rows_left + slack) // B, (num_rows - start) // B)

        def body(j: Array, carry: Any, first: Array = start, B: int = B) -> Any:
            return step(carry, first + j * B, B)

        carry = lax.fori_loop(0, num_blocks, body, carry)
        start = start + num_blocks * B
    return carry


def _for_experts(expert: Callable[[Array, Any], Any], carry: Any, size_e: Array) -> Any:
    """Folds `expert(i, carry)` over the experts that have rows, in order.

    A visit copies the weights of an expert, rows or not. When a text is written token by token,
    most experts have none.
    """
    has_rows_e = size_e > 0
    # Stable, so that those with rows come first and in their order.
    expert_index_e = jnp.argsort(~has_rows_e, stable=True)

    def body(j: Array, carry: Any) -> Any:
        return expert(expert_index_e[j], carry)

    return lax.fori_loop(0, has_rows_e.sum(dtype=jnp.int32), body, carry)


def serve_rows(
    network: Callable[..., Array],
    x_RD: Array,
    gate_R: Array,
    start_e: Array,
    size_e: Array,
    block: tuple[int, int],
) -> Array:
    """Returns y_RD with y = network(i, x, gate) for the rows of expert i, some at a time.

    The layout is that of `grouped_matmul.expert_ffn`; it is for inference alone.
    """

    def expert(i: Array, y_RD: Array) -> Array:
        start, size = start_e[i], size_e[i]

        def step(y_RD: Array, offset: Array, B: int) -> Array:
            x_BD = _own_rows(x_RD, offset, B, start + size)
            gate_B = _rows(gate_R, offset, B)
            return _put_rows(y_RD, network(i, x_BD, gate_B), offset)

        return _for_blocks(step, y_RD, start, size, x_RD.shape[0], block)

    return _for_experts(expert, jnp.zeros_like(x_RD), size_e)


def _rows(array_RX: Array, offset: Array, B: int) -> Array:
    """Returns rows [offset, offset + B)."""
    return lax.dynamic_slice_in_dim(array_RX, offset, B)


def _own_rows(array_RD: Array, offset: Array, B: int, end: Array) -> Array:
    """Returns rows [offset, offset + B), those from `end` on as zeros."""
    row_B = offset + jnp.arange(B, dtype=offset.dtype)
    is_own_B = row_B < end
    return jnp.where(is_own_B[:, None], _rows(array_RD, offset, B), 0)


def _put_rows(array_RX: Array, block_BX: Array, offset: Array) -> Array:
    """Returns the array with a block in the place of its rows from `offset` on."""
    return lax.dynamic_update_slice_in_dim(array_RX, block_BX.astype(array_RX.dtype), offset, 0)


def _add_to(total_eXY: Array, i: Array, addend_XY: Array) -> Array:
    """Returns the sums of all experts, with more added to that of one, in its place."""
    before_XY = lax.dynamic_index_in_dim(total_eXY, i, keepdims=False)
    return lax.dynamic_update_index_in_dim(total_eXY, before_XY + addend_XY, i, 0)


def _outer(a_BX: Array, b_BY: Array, dtype: Any) -> Array:
    """Returns a^T @ b [X, Y].

    The rows are two dimensions here. XLA's CPU compiler then transposes `a` first and takes its
    fast product; a single dimension it leaves to another one, 1.5 times as slow.
    """
    num_rows = a_BX.shape[0]
    a = a_BX.reshape(2, num_rows // 2, -1)
    b = b_BY.reshape(2, num_rows // 2, -1)
    over_rows = (((0, 1), (0, 1)), ((), ()))
    return lax.dot_general(a, b, over_rows, preferred_element_type=dtype)


def forward(
    act: Callable[[Array], Array], block: tuple[int, int], rows: Rows, layout: Layout
) -> tuple[Array, Array]:
    """Returns (y_RD, pre_RH): the results, and the pre-activations that the backward pass reads."""
    x_RD, gate_R, w_in_eDH, w_out_eFD, biases = rows
    num_rows, dtype = x_RD.shape[0], x_RD.dtype

    def expert(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        w_in_DH = w_in_eDH[i].astype(dtype)
        w_out_FD = w_out_eFD[i].astype(dtype)
        start, size = layout.start_e[i], layout.size_e[i]
        own = of_expert(biases, i)

        def step(carry: tuple[Array, Array], offset: Array, B: int) -> tuple[Array, Array]:
            y_RD, pre_RH = carry
            x_BD = _own_rows(x_RD, offset, B, start + size)
            gate_B = _rows(gate_R, offset, B)
            if own is not None:
                # Rows of nobody are zeros, which a bias would lift.
                gate_B = _own_rows(gate_R[:, None], offset, B, start + size)[:, 0]
            y_BD, pre_BH = forward_rows(act, x_BD, gate_B, w_in_DH, w_out_FD, own)
            return _put_rows(y_RD, y_BD, offset), _put_rows(pre_RH, pre_BH, offset)

        return _for_blocks(step, carry, start, size, num_rows, block)

    y_RD = own_zeros(x_RD, x_RD.shape, dtype)
    pre_RH = own_zeros(x_RD, (num_rows, w_in_eDH.shape[2]), dtype)
    return _for_experts(expert, (y_RD, pre_RH), layout.size_e)


def backward(
    act: Callable[[Array], Array],
    block: tuple[int, int],
    rows: Rows,
    layout: Layout,
    pre_RH: Array,
    dy_RD: Array,
) -> Rows:
    """Returns the cotangents of the rows from that of y; `backward_rows` has the equations."""
    x_RD, gate_R, w_in_eDH, w_out_eFD, biases = rows
    num_rows, dtype = x_RD.shape[0], x_RD.dtype
    wide = wide_dtype(dtype)

    def expert(i: Array, cotangents: Rows) -> Rows:
        w_in_DH = w_in_eDH[i].astype(dtype)
        w_out_FD = w_out_eFD[i].astype(dtype)
        start, size = layout.start_e[i], layout.size_e[i]

        def step(sums: Rows, offset: Array, B: int) -> Rows:
            # It is zero beyond the expert's rows, so all that follows is.
            dy_BD = _own_rows(dy_RD, offset, B, start + size)
            x_BD, gate_B = _rows(x_RD, offset, B), _rows(gate_R, offset, B)
            some = Rows(x_BD, gate_B, w_in_DH, w_out_FD, of_expert(biases, i))
            pre_BH = _rows(pre_RH, offset, B)
            of_some = backward_rows(act, some, pre_BH, dy_BD, _outer)

            def add(total_eX: Array, addend_X: Array) -> Array:
                return _add_to(total_eX, i, addend_X)

            return Rows(
                _put_rows(sums.x_RD, of_some.x_RD, offset),
                _put_rows(sums.gate_R, of_some.gate_R, offset),
                add(sums.w_in_eDH, of_some.w_in_eDH),
                add(sums.w_out_eFD, of_some.w_out_eFD),
                jax.tree.map(add, sums.biases, of_some.biases),
            )

        return _for_blocks(step, cotangents, start, size, num_rows, block)

    def zeros(array: Array, dtype: Any) -> Array:
        return own_zeros(dy_RD, array.shape, dtype)

    # Weights' are added up in a wide type. An expert without rows is not visited: its stay zero.
    sums = Rows(
        zeros(x_RD, dtype),
        zeros(gate_R, dtype),
        zeros(w_in_eDH, wide),
        zeros(w_out_eFD, wide),
        jax.tree.map(lambda bias: zeros(bias, wide), biases),
    )
    sums = _for_experts(expert, sums, layout.size_e)
    return jax.tree.map(lambda total, array: total.astype(array.dtype), sums, rows)
