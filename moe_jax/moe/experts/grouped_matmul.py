"""The experts' feed-forward network on rows grouped by expert, and the gathers that group them.

`jax.lax.ragged_dot` costs E times the useful work on a CPU, so there the kernel is our own: it
visits the experts one after another with their weights held (one copy of the weights per expert),
and runs over the rows of each in blocks of a few static sizes with trip counts known only at run
time. An expert without rows costs nothing. Such loops have no derivative, hence the `custom_vjp`.
Every other platform takes `ragged_dot`; the choice is by the platform compiled for, so that a plan
made on a CPU for a TPU is the TPU's.

Everything here may be called inside a `jax.shard_map` with `check_vma=True` whatever varies over
which mesh axis, and on a single device.

T tokens, K choices per token, R rows, e experts on this device, D model, F expert hidden, P parts
of the first weight (2: gate and up, 1 otherwise), H = P * F pre-activations of a row, B rows of a
block.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.parallel.compiling import by_platform
from moe_jax.precision import wide_dtype


def swiglu(pre_BH: Array) -> Array:
    """silu(gate) * up (Shazeer 2020, eq. 6); `pre_BH` holds the gate in its first half and up in
    its second.
    """
    gate_BF, up_BF = jnp.split(pre_BH, 2, axis=-1)
    return jax.nn.silu(gate_BF) * up_BF


def gelu(pre_BH: Array) -> Array:
    """GELU in its tanh approximation."""
    return jax.nn.gelu(pre_BH)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"swiglu": swiglu, "gelu": gelu}
PARTS = {"swiglu": 2, "gelu": 1}


class Rows(NamedTuple):
    """Holds what `expert_ffn` works on; cotangents have the same structure."""

    x_RD: Array
    gate_R: Array
    w_in_eDH: Array
    w_out_eFD: Array


class Layout(NamedTuple):
    """Says where the rows of each expert are."""

    start_e: Array
    size_e: Array


def vary_alike(*arrays: Array) -> list[Array]:
    """Makes all arrays vary over the union of the mesh axes that any of them varies over, inside a
    `shard_map`.

    A `custom_vjp` must return cotangents that vary exactly as its primals do, which is certain only
    when all of them vary alike; the sum over the added axes is then the transpose of this function.
    A scalar zero made by `zeros_like` varies as its model does, and adding it costs nothing: XLA
    removes the addition, the type remains.
    """
    zero = functools.reduce(
        jnp.add, (jnp.zeros_like(array, shape=(), dtype=jnp.int32) for array in arrays)
    )
    return [array + zero.astype(array.dtype) for array in arrays]


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
) -> Array:
    """y_RD with y = (activation(x @ w_in[i]) * gate) @ w_out[i] for every row of expert i; zero for
    all other rows.

    The router's weight multiplies the hidden row, so combining is a plain sum over a token's rows.

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
    parts = w_in_eDPF.shape[2]
    if large % small or x_RD.shape[0] % small:
        raise ValueError(
            f"block {block} must divide evenly, and its small size must divide R = {x_RD.shape[0]}"
        )
    if parts != PARTS[activation]:
        raise ValueError(
            f"{activation} needs w_in_eDPF with P = {PARTS[activation]}, got shape "
            f"{w_in_eDPF.shape}"
        )
    w_in_eDH = w_in_eDPF.reshape(*w_in_eDPF.shape[:2], -1)
    x_RD, gate_R, w_in_eDH, w_out_eFD, start_e, size_e = vary_alike(
        x_RD, gate_R, w_in_eDH, w_out_eFD, start_e, size_e
    )
    return _grouped_ffn(
        activation, block, Rows(x_RD, gate_R, w_in_eDH, w_out_eFD), Layout(start_e, size_e)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_ffn(activation: str, block: tuple[int, int], rows: Rows, layout: Layout) -> Array:
    return _forward(activation, block, rows, layout)[0]


def _forward(
    activation: str, block: tuple[int, int], rows: Rows, layout: Layout
) -> tuple[Array, Any]:
    act = ACTIVATIONS[activation]
    y_RD, pre_RH = by_platform(
        rows,
        layout,
        cpu=functools.partial(_forward_blocks, act, block),
        others=functools.partial(_forward_ragged, act),
    )
    return y_RD, (rows, layout, pre_RH)


def _backward(
    activation: str, block: tuple[int, int], residue: Any, dy_RD: Array
) -> tuple[Rows, None]:
    act = ACTIVATIONS[activation]
    gradient = by_platform(
        *residue,
        dy_RD,
        cpu=functools.partial(_backward_blocks, act, block),
        others=functools.partial(_backward_ragged, act),
    )
    return gradient, None


_grouped_ffn.defvjp(_forward, _backward)


# The CPU's kernel.


def block_sizes(rows_mean: float) -> tuple[int, int]:
    """(large, small) block for a mean number of rows per expert.

    A large block near the mean serves most experts in one or two steps, the small one bounds the
    padding. Measured at 2048 and 4096 tokens, K = 2, D = 128 and 256, E = 8 and 64: no other choice
    was better by more than the noise.
    """
    large = 2 ** min(max(round(math.log2(max(rows_mean, 1.0))), 3), 10)
    return large, large // 16 if large > 256 else 16 if large > 16 else 8


def _ladder(block: tuple[int, int]) -> tuple[int, ...]:
    """The static block sizes, largest first: one between the two given saves many small steps."""
    large, small = block
    return tuple(sorted({large, small * math.isqrt(large // small), small}, reverse=True))


def _for_blocks(
    step: Callable, carry: Any, start: Array, size: Array, num_rows: int, block: tuple[int, int]
) -> Any:
    """Folds `step(carry, offset, B)` over blocks that cover [start, start + size) in order.

    A block may reach past the rows by up to a quarter of itself, into rows of later experts: a few
    masked rows cost less than another round over the weights. So steps must mask, and what they
    write there must be overwritten by those experts' own steps, which come later. `num_rows` (R)
    keeps blocks inside the buffer.
    """
    end = start + size
    for B in (B for B in _ladder(block) if B <= num_rows):
        slack = B - 1 if B == block[1] else B // 4
        trips = jnp.minimum((jnp.maximum(end - start, 0) + slack) // B, (num_rows - start) // B)
        carry = lax.fori_loop(
            0, trips, lambda j, carry, start=start, B=B: step(carry, start + j * B, B), carry
        )
        start = start + trips * B
    return carry


def serve_rows(
    network: Callable,
    x_RD: Array,
    gate_R: Array,
    start_e: Array,
    size_e: Array,
    block: tuple[int, int],
) -> Array:
    """y_RD with y = network(i, x, gate) for the rows of expert i, some at a time; as `expert_ffn`,
    for inference alone.
    """

    def expert(i: Array, y_RD: Array) -> Array:
        start, size = start_e[i], size_e[i]

        def step(y_RD: Array, offset: Array, B: int) -> Array:
            y_BD = network(i, _read_rows(x_RD, offset, B, start + size), _read(gate_R, offset, B))
            return _write(y_RD, y_BD, offset)

        return _for_blocks(step, y_RD, start, size, x_RD.shape[0], block)

    return lax.fori_loop(0, start_e.shape[0], expert, jnp.zeros_like(x_RD))


def _read(array_RX: Array, offset: Array, B: int) -> Array:
    return lax.dynamic_slice_in_dim(array_RX, offset, B)


def _read_rows(array_RD: Array, offset: Array, B: int, end: Array) -> Array:
    """Rows [offset, offset + B), those from `end` on as zeros."""
    mine_B = offset + jnp.arange(B, dtype=offset.dtype) < end
    return jnp.where(mine_B[:, None], _read(array_RD, offset, B), 0)


def _write(array_RX: Array, block_BX: Array, offset: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(array_RX, block_BX.astype(array_RX.dtype), offset, 0)


def _dot(a: Array, b: Array, dim_a: int, dim_b: int, dtype: Any) -> Array:
    """Contracts dimension `dim_a` of matrix a with `dim_b` of matrix b."""
    return lax.dot_general(a, b, (((dim_a,), (dim_b,)), ((), ())), preferred_element_type=dtype)


def _forward_blocks(
    act: Callable, block: tuple[int, int], rows: Rows, layout: Layout
) -> tuple[Array, Array]:
    x_RD, gate_R, w_in_eDH, w_out_eFD = rows
    num_rows, dtype = x_RD.shape[0], x_RD.dtype
    wide = wide_dtype(dtype)

    def expert(i, carry):
        w_in_DH, w_out_FD = w_in_eDH[i].astype(dtype), w_out_eFD[i].astype(dtype)
        start, size = layout.start_e[i], layout.size_e[i]

        def step(carry, offset, B):
            y_RD, pre_RH = carry
            pre_BH = _dot(_read_rows(x_RD, offset, B, start + size), w_in_DH, 1, 0, dtype)
            gate_B = _read(gate_R, offset, B).astype(wide)
            hidden_BF = (act(pre_BH.astype(wide)) * gate_B[:, None]).astype(dtype)
            return _write(y_RD, _dot(hidden_BF, w_out_FD, 1, 0, dtype), offset), _write(
                pre_RH, pre_BH, offset
            )

        return _for_blocks(step, carry, start, size, num_rows, block)

    pre_RH = jnp.zeros_like(x_RD, shape=(num_rows, w_in_eDH.shape[2]))
    return lax.fori_loop(0, w_in_eDH.shape[0], expert, (jnp.zeros_like(x_RD), pre_RH))


def _backward_blocks(
    act: Callable, block: tuple[int, int], rows: Rows, layout: Layout, pre_RH: Array, dy_RD: Array
) -> Rows:
    x_RD, gate_R, w_in_eDH, w_out_eFD = rows
    num_rows, dtype = x_RD.shape[0], x_RD.dtype
    wide = wide_dtype(dtype)

    def expert(i, carry):
        total, dw_in_DH, dw_out_FD = carry
        w_in_DH, w_out_FD = w_in_eDH[i].astype(dtype), w_out_eFD[i].astype(dtype)
        start, size = layout.start_e[i], layout.size_e[i]

        def step(carry, offset, B):
            dx_RD, dgate_R, dw_in_DH, dw_out_FD = carry
            dy_BD = _read_rows(
                dy_RD, offset, B, start + size
            )  # zero beyond the expert's rows, so all below is
            dh_BF = _dot(dy_BD, w_out_FD, 1, 1, wide)
            gate_B = _read(gate_R, offset, B).astype(wide)
            h_BF, pull = jax.vjp(act, _read(pre_RH, offset, B).astype(wide))
            dpre_BH = pull(dh_BF * gate_B[:, None])[0].astype(dtype)
            hidden_BF = (h_BF * gate_B[:, None]).astype(dtype)
            first = offset == start  # the buffers still hold the previous expert's sums
            dw_in_DH = jnp.where(first, 0, dw_in_DH) + _dot(
                _read(x_RD, offset, B), dpre_BH, 0, 0, wide
            )
            dw_out_FD = jnp.where(first, 0, dw_out_FD) + _dot(hidden_BF, dy_BD, 0, 0, wide)
            dx_RD = _write(dx_RD, _dot(dpre_BH, w_in_DH, 1, 1, dtype), offset)
            return (
                dx_RD,
                _write(dgate_R, jnp.sum(dh_BF * h_BF, axis=-1), offset),
                dw_in_DH,
                dw_out_FD,
            )

        sums = (total.x_RD, total.gate_R, dw_in_DH, dw_out_FD)
        dx_RD, dgate_R, dw_in_DH, dw_out_FD = _for_blocks(step, sums, start, size, num_rows, block)

        def put(dw_e, dw):
            return dw_e.at[i].set(jnp.where(size > 0, dw, 0).astype(dw_e.dtype))

        total = Rows(dx_RD, dgate_R, put(total.w_in_eDH, dw_in_DH), put(total.w_out_eFD, dw_out_FD))
        return total, dw_in_DH, dw_out_FD

    def zero_of(w_e):
        return jnp.zeros_like(w_e, shape=w_e.shape[1:], dtype=wide)

    carry = (jax.tree.map(jnp.zeros_like, rows), zero_of(w_in_eDH), zero_of(w_out_eFD))
    return lax.fori_loop(0, w_in_eDH.shape[0], expert, carry)[0]


# Every other platform's kernel.


def _ragged(layout: Layout, num_rows: int) -> tuple[Array, Array]:
    """(group sizes for `ragged_dot`, which rows count): a gap goes to the expert before it, the end
    to nobody.
    """
    start_e, size_e = layout
    stop_e = jnp.concatenate([start_e[1:], start_e[-1:] + size_e[-1:]])
    group_e = jnp.diff(stop_e, prepend=jnp.zeros_like(stop_e[:1]))
    row_R1 = jnp.arange(num_rows, dtype=start_e.dtype)[:, None]
    mine_Re = (row_R1 >= start_e[None]) & (row_R1 < (start_e + size_e)[None])
    return group_e, jnp.any(mine_Re, axis=1)


def _forward_ragged(act: Callable, rows: Rows, layout: Layout) -> tuple[Array, Array]:
    x_RD, gate_R, w_in_eDH, w_out_eFD = rows
    dtype = x_RD.dtype
    wide = wide_dtype(dtype)
    group_e, mine_R = _ragged(layout, x_RD.shape[0])
    pre_RH = lax.ragged_dot(x_RD, w_in_eDH.astype(dtype), group_e)
    hidden_RF = (act(pre_RH.astype(wide)) * gate_R.astype(wide)[:, None]).astype(dtype)
    y_RD = lax.ragged_dot(hidden_RF, w_out_eFD.astype(dtype), group_e)
    return jnp.where(mine_R[:, None], y_RD, 0), pre_RH


def _backward_ragged(
    act: Callable, rows: Rows, layout: Layout, pre_RH: Array, dy_RD: Array
) -> Rows:
    x_RD, gate_R, w_in_eDH, w_out_eFD = rows
    dtype = x_RD.dtype
    wide = wide_dtype(dtype)
    group_e, mine_R = _ragged(layout, x_RD.shape[0])

    def keep(array_RX):
        return jnp.where(
            mine_R[:, None], array_RX, 0
        )  # past the last group a platform may leave anything

    gate_R1 = gate_R.astype(wide)[:, None]

    def matmul(a_RX, w_eXY):
        return lax.ragged_dot(a_RX, w_eXY.astype(dtype), group_e)

    h_RF, pull_act = jax.vjp(act, keep(pre_RH).astype(wide))
    _, pull_out = jax.vjp(matmul, (h_RF * gate_R1).astype(dtype), w_out_eFD)
    _, pull_in = jax.vjp(matmul, x_RD, w_in_eDH)
    dh_RF, dw_out_eFD = pull_out(dy_RD)
    dh_RF = keep(dh_RF).astype(wide)
    dpre_RH = pull_act(dh_RF * gate_R1)[0].astype(dtype)
    dx_RD, dw_in_eDH = pull_in(dpre_RH)
    dgate_R = jnp.sum(dh_RF * h_RF, axis=-1).astype(gate_R.dtype)
    return Rows(keep(dx_RD), dgate_R, dw_in_eDH, dw_out_eFD)


# Between tokens and rows: a gather both ways, for a scatter of floats costs several times as much.


def take_rows(x_TD: Array, src_R: Array, dest_TK: Array | None) -> Array:
    """x_RD with x_RD[r] = x_TD[src_R[r]], zero where src_R[r] == T.

    `dest_TK` lists the rows of every token (R: none); it makes the backward pass a gather. Without
    it (None, a routing with no fixed number of choices per token) the backward pass is a
    scatter-add.
    """
    if dest_TK is None:
        return _gather(x_TD, src_R)
    return _gather_rows(*vary_alike(x_TD, src_R, dest_TK))


def sum_rows(y_RD: Array, dest_TK: Array | None, src_R: Array, num_tokens: int) -> Array:
    """y_TD with y_TD[t] = the sum of the rows r that have src_R[r] == t: the transpose of
    `take_rows`.
    """
    if dest_TK is None:
        y_RD, src_R = vary_alike(y_RD, src_R)
        return (
            jnp.zeros_like(y_RD, shape=(num_tokens, y_RD.shape[1])).at[src_R].add(y_RD, mode="drop")
        )
    return _gather_sum(*vary_alike(y_RD, dest_TK, src_R))


def _gather(x_TD: Array, index_N: Array) -> Array:
    return x_TD.at[index_N].get(mode="fill", fill_value=0)


def _gather_and_add(y_RD: Array, dest_TK: Array) -> Array:
    """One gather per choice, added as it is read: a [T, K, D] array and its reduction cost twice
    the time.
    """
    wide = wide_dtype(y_RD.dtype)
    taken = (_gather(y_RD, dest_TK[:, k]).astype(wide) for k in range(dest_TK.shape[1]))
    return functools.reduce(jnp.add, taken).astype(y_RD.dtype)


@jax.custom_vjp
def _gather_rows(x_TD: Array, src_R: Array, dest_TK: Array) -> Array:
    return _gather(x_TD, src_R)


_gather_rows.defvjp(
    lambda x_TD, src_R, dest_TK: (_gather(x_TD, src_R), dest_TK),
    lambda dest_TK, dx_RD: (_gather_and_add(dx_RD, dest_TK), None, None),
)


@jax.custom_vjp
def _gather_sum(y_RD: Array, dest_TK: Array, src_R: Array) -> Array:
    return _gather_and_add(y_RD, dest_TK)


_gather_sum.defvjp(
    lambda y_RD, dest_TK, src_R: (_gather_and_add(y_RD, dest_TK), src_R),
    lambda src_R, dy_TD: (_gather(dy_TD, src_R), None, None),
)
