"""The experts' kernel for CPUs: the rows of each expert in blocks of a few static sizes.

It visits the experts that have rows one after another with their weights held (one copy of the
weights per expert), and runs over the rows of each with trip counts known only at run time. Such
loops have no derivative, so the backward pass is written out.

Shapes: see network.py; B rows of a block.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.moe.experts.network import Layout, Rows, backward_rows, forward_rows, of_expert
from moe_jax.parallel.outer import outer
from moe_jax.parallel.zeros import own_zeros
from moe_jax.precision import wide_dtype

# Rows of a block of this kernel, and of the large block that other kernels cut their tiles from.
MOST_ROWS, MOST_LARGE = 1024, 8192
# What a block of this kernel costs beside its rows, in rows: every product reads the weights and
# puts them in order, and their gradients are written. Measured with blocks of 64 and of 512 rows.
BLOCK_COST = 50
# An expert takes fewer than so many blocks of each size but the largest.
FEW = 5


def block_sizes(rows_mean: float) -> tuple[int, int]:
    """Returns the (large, small) block for a mean number of rows per expert.

    The large one is near the mean. Each expert begins at a multiple of the small one.
    """
    # The power of two that is nearest to the mean, from 8 to 1024.
    exponent = round(math.log2(max(rows_mean, 1.0)))
    large = min(2 ** max(exponent, 3), MOST_LARGE)
    if large > 256:
        return large, min(large, MOST_ROWS) // 16
    return large, 16 if large > 16 else 8


def cover_sizes(block: tuple[int, int], num_rows: int) -> tuple[int, ...]:
    """Returns the static sizes of this kernel's blocks, largest first.

    No block is larger than the buffer of `num_rows`.
    """
    large = min(block[0], MOST_ROWS)
    # Where blocks are large, padding costs more than a further block, where they are small less.
    # With these sizes a load at its mean is not padded. One that deviates by a twentieth to a half
    # of it, as those of language models do, costs a few hundredths more than with the best triple.
    factors = (1 / 4, 1, 9 / 8) if large > 128 else (1, 5 / 4, 7 / 4)
    sizes = {8 * math.ceil(factor * large / 8) for factor in factors}
    fitting = {size for size in sizes if size <= num_rows} or {num_rows}
    return tuple(sorted(fitting, reverse=True))


def num_blocks(sizes: tuple[int, ...], size_e: Array) -> Array:
    """Returns how many blocks of each size cover the rows of every expert at the least cost [e, S].

    Looked at are up to FEW - 1 blocks of each smaller size, with as many of the largest as are
    needed for the rest: C choices in all.
    """
    largest, *smaller = sizes

    def counts(choice: Array) -> list[Array]:
        """Returns the number of blocks of each smaller size; a choice has one digit for each."""
        return [choice // FEW**digit % FEW for digit in range(len(smaller))]

    def of_largest(rows: Array, choice: Array) -> Array:
        """Returns how many of the largest cover what a choice leaves of some rows."""
        for size, number in zip(smaller, counts(choice), strict=True):
            rows = rows - size * number
        return (jnp.maximum(rows, 0) + largest - 1) // largest

    # Made here and no constant, which a rematerialised layer would keep.
    choice_1C = jnp.arange(FEW ** len(smaller), dtype=size_e.dtype)[None]
    cost_eC = (BLOCK_COST + largest) * of_largest(size_e[:, None], choice_1C)
    for size, number_1C in zip(smaller, counts(choice_1C), strict=True):
        cost_eC = cost_eC + (BLOCK_COST + size) * number_1C
    best_e = jnp.argmin(cost_eC, axis=1).astype(size_e.dtype)
    return jnp.stack([of_largest(size_e, best_e), *counts(best_e)], axis=1)


class _Span(NamedTuple):
    """Holds where a block of B rows is: [at, at + B). Others' rows may be among them."""

    at: Array
    is_own_B: Array

    def read(self, array_RX: Array) -> Array:
        """Returns the rows of the block, its own and others."""
        return lax.dynamic_slice_in_dim(array_RX, self.at, len(self.is_own_B))

    def read_own(self, array_RD: Array) -> Array:
        """Returns the rows of the block, those that are not its own as zeros."""
        return jnp.where(self.is_own_B[:, None], self.read(array_RD), 0)

    def write(self, array_RX: Array, block_BX: Array) -> Array:
        """Returns the array with the block's own rows in their places."""
        is_own = self.is_own_B.reshape(-1, *(1,) * (array_RX.ndim - 1))
        rows = jnp.where(is_own, block_BX.astype(array_RX.dtype), self.read(array_RX))
        return lax.dynamic_update_slice_in_dim(array_RX, rows, self.at, 0)


class _Cover(NamedTuple):
    """Holds which blocks cover the rows of each expert."""

    layout: Layout
    # Largest first.
    sizes: tuple[int, ...]
    num_blocks_eS: Array
    # R, of the buffer.
    num_rows: int

    def fold(self, step: Callable[[Any, _Span], Any], carry: Any, i: Array) -> Any:
        """Folds `step(carry, span)` over the blocks of expert i, in order."""
        first = self.layout.start_e[i]
        end = first + self.layout.size_e[i]
        for B, num in zip(self.sizes, self.num_blocks_eS[i], strict=True):

            def body(j: Array, carry: Any, first: Array = first, B: int = B) -> Any:
                start = first + j * B
                # A block that would reach beyond the buffer begins earlier.
                at = jnp.minimum(start, self.num_rows - B)
                row_B = at + jnp.arange(B, dtype=at.dtype)
                return step(carry, _Span(at, (row_B >= start) & (row_B < end)))

            carry = lax.fori_loop(0, num, body, carry)
            first = first + num * B
        return carry


def _cover(block: tuple[int, int], layout: Layout, num_rows: int) -> _Cover:
    """Returns the cheapest cover of the experts' rows by blocks."""
    sizes = cover_sizes(block, num_rows)
    return _Cover(layout, sizes, num_blocks(sizes, layout.size_e), num_rows)


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
    cover = _cover(block, Layout(start_e, size_e), x_RD.shape[0])

    def expert(i: Array, y_RD: Array) -> Array:
        def step(y_RD: Array, span: _Span) -> Array:
            return span.write(y_RD, network(i, span.read(x_RD), span.read(gate_R)))

        return cover.fold(step, y_RD, i)

    return _for_experts(expert, jnp.zeros_like(x_RD), size_e)


def _add_to(total_eXY: Array, i: Array, addend_XY: Array) -> Array:
    """Returns the sums of all experts, with more added to that of one, in its place."""
    before_XY = lax.dynamic_index_in_dim(total_eXY, i, keepdims=False)
    return lax.dynamic_update_index_in_dim(total_eXY, before_XY + addend_XY, i, 0)


def forward(
    act: Callable[[Array], Array], block: tuple[int, int], rows: Rows, layout: Layout
) -> tuple[Array, Array]:
    """Returns (y_RD, pre_RH): the results, and the pre-activations that the backward pass reads."""
    x_RD, gate_R, w_in_eDH, w_out_eFD, biases = rows
    num_rows, dtype = x_RD.shape[0], x_RD.dtype
    cover = _cover(block, layout, num_rows)

    def expert(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        w_in_DH = w_in_eDH[i].astype(dtype)
        w_out_FD = w_out_eFD[i].astype(dtype)
        own_biases = of_expert(biases, i)

        def step(carry: tuple[Array, Array], span: _Span) -> tuple[Array, Array]:
            y_RD, pre_RH = carry
            x_BD, gate_B = span.read(x_RD), span.read(gate_R)
            y_BD, pre_BH = forward_rows(act, x_BD, gate_B, w_in_DH, w_out_FD, own_biases)
            return span.write(y_RD, y_BD), span.write(pre_RH, pre_BH)

        return cover.fold(step, carry, i)

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
    cover = _cover(block, layout, num_rows)

    def expert(i: Array, cotangents: Rows) -> Rows:
        w_in_DH = w_in_eDH[i].astype(dtype)
        w_out_FD = w_out_eFD[i].astype(dtype)

        def step(sums: Rows, span: _Span) -> Rows:
            x_BD, gate_B, pre_BH = span.read(x_RD), span.read(gate_R), span.read(pre_RH)
            some = Rows(x_BD, gate_B, w_in_DH, w_out_FD, of_expert(biases, i))
            # It is zero in rows that are not its own, so these add nothing to the weights'.
            dy_BD = span.read_own(dy_RD)
            of_some = backward_rows(act, some, pre_BH, dy_BD, outer)

            def add(total_eX: Array, addend_X: Array) -> Array:
                return _add_to(total_eX, i, addend_X)

            return Rows(
                span.write(sums.x_RD, of_some.x_RD),
                span.write(sums.gate_R, of_some.gate_R),
                add(sums.w_in_eDH, of_some.w_in_eDH),
                add(sums.w_out_eFD, of_some.w_out_eFD),
                jax.tree.map(add, sums.biases, of_some.biases),
            )

        return cover.fold(step, cotangents, i)

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
