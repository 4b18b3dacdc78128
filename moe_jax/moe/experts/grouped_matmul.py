"""The experts' feed-forward network on rows that are grouped by expert.

A CPU has a kernel of its own (blocks.py), every other platform takes `jax.lax.ragged_dot`
(ragged.py). The choice is by the platform compiled for, so that a plan made on a CPU for a TPU is
the TPU's.

It may be called inside a `jax.shard_map` with `check_vma=True` whatever varies over which mesh
axis, and on a single device.

Shapes: see network.py.
"""

import functools
from typing import Any

import jax
from jax import Array

from moe_jax.moe.experts import blocks, ragged
from moe_jax.moe.experts.network import Biases, Chosen, Layout, Rows
from moe_jax.parallel.compiling import by_platform
from moe_jax.parallel.varying import vary_alike


def expert_ffn(
    x_RD: Array,
    gate_R: Array,
    start_e: Array,
    size_e: Array,
    w_in_eDPF: Array,
    w_out_eFD: Array,
    *,
    activation: str,
    block: tuple[int, int],
    options: Any = None,
    biases: tuple[Array, Array] | None = None,
) -> Array:
    """Returns y_RD: y = (activation(x @ w_in[i]) * gate) @ w_out[i] for every row of expert i.

    All other rows are zero. The router's weight multiplies the hidden row, so combining is a plain
    sum over a token's rows. `options` are those of the activation, None = its defaults. `biases`
    are (in_ePF, out_eD), which are added after w_in and after w_out.

    Rows of expert i are [start_e[i], start_e[i] + size_e[i]). Starts never decrease with i and are
    multiples of `block[1]`, as R is; the room up to the next multiple belongs to the expert too.
    Rows in nobody's range (padding of a room, gaps, the end of the buffer) may hold anything
    finite: they give zero and pass no gradient on.

    `block` is (large, small) rows per step, from `block_sizes`; the first is a multiple of the
    second. Weights may be wider than the rows: they are rounded to the rows' dtype at use, and
    their gradient is accumulated in float32 or wider and comes in their own dtype. Where F is
    sharded, y is this shard's part of the sum over shards.
    """
    large, small = block
    num_rows = x_RD.shape[0]
    if large % small or num_rows % small:
        raise ValueError(
            f"block {block} must divide evenly, and its small size must divide R = {num_rows}"
        )
    num_experts, d_model, num_parts, _ = w_in_eDPF.shape
    chosen = Chosen(activation, options)
    if num_parts != chosen.parts:
        raise ValueError(
            f"{activation} needs w_in_eDPF with P = {chosen.parts}, got shape {w_in_eDPF.shape}"
        )
    # Gate and up side by side, so that both are one product.
    w_in_eDH = w_in_eDPF.reshape(num_experts, d_model, -1)
    x_RD, gate_R, w_in_eDH, w_out_eFD, start_e, size_e = vary_alike(
        x_RD, gate_R, w_in_eDH, w_out_eFD, start_e, size_e
    )
    rows = Rows(x_RD, gate_R, w_in_eDH, w_out_eFD)
    if biases is not None:
        in_eH, out_eD = biases[0].reshape(num_experts, -1), biases[1]
        # The others vary as x does.
        _, in_eH, out_eD = vary_alike(x_RD, in_eH, out_eD)
        rows = rows._replace(biases=Biases(in_eH, out_eD))
    return _grouped_ffn(chosen, block, rows, Layout(start_e, size_e))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_ffn(chosen: Chosen, block: tuple[int, int], rows: Rows, layout: Layout) -> Array:
    y_RD, _ = _forward(chosen, block, rows, layout)
    return y_RD


def _forward(
    chosen: Chosen, block: tuple[int, int], rows: Rows, layout: Layout
) -> tuple[Array, Any]:
    act = chosen.function()
    y_RD, pre_RH = by_platform(
        rows,
        layout,
        cpu=functools.partial(blocks.forward, act, block),
        others=functools.partial(ragged.forward, act),
    )
    return y_RD, (rows, layout, pre_RH)


def _backward(
    chosen: Chosen, block: tuple[int, int], residuals: Any, dy_RD: Array
) -> tuple[Rows, None]:
    act = chosen.function()
    cotangents = by_platform(
        *residuals,
        dy_RD,
        cpu=functools.partial(blocks.backward, act, block),
        others=functools.partial(ragged.backward, act),
    )
    # The layout is integers, which have no cotangent.
    return cotangents, None


_grouped_ffn.defvjp(_forward, _backward)
