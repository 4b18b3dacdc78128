"""The experts' feed-forward network on rows that are grouped by expert.

A CPU has a kernel of its own (blocks.py) and so has a TPU (pallas_tpu.py); every other platform
takes plain XLA (tiles.py). The choice is by the platform compiled for, so that a plan made on a CPU
for a TPU is the TPU's; a name from KERNELS takes one kernel everywhere, and plain XLA where it
cannot serve.

It may be called inside a `jax.shard_map` with `check_vma=True` whatever varies over which mesh
axis, and on a single device.

Shapes: see network.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe import kept
from moe_jax.moe.experts import blocks, hopper, narrow, pallas_tpu, ragged, tiles, whole
from moe_jax.moe.experts.network import Biases, Case, Chosen, KernelSizes, Layout, Rows
from moe_jax.parallel.compiling import by_platform
from moe_jax.parallel.varying import vary_alike


class Kernel(NamedTuple):
    """Holds how the network is computed: (activation, block, rows, layout), and backward also what
    forward kept and the cotangent of y.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., Rows]
    # What plans ask of a kernel whose work follows the load: rows that are computed beyond those
    # that experts have, on average; None = it is not known.
    padded_rows: Callable[[KernelSizes], int] | None = None
    # Rows of a round of its loop; None = it has no loop that the program shows.
    round_rows: Callable[[KernelSizes], int] | None = None
    # Whether it computes a case; None = it computes all.
    serves: Callable[[Case], bool] | None = None


def _of_products(products: Callable[..., whole.Products], **of_plans: Any) -> Kernel:
    """Returns the kernel that is made of three products over all rows."""

    def forward(act: Any, block: tuple[int, int], rows: Rows, layout: Layout) -> Any:
        return whole.forward(act, products(layout, block), rows, layout)

    def backward(act: Any, block: tuple[int, int], rows: Rows, layout: Layout, *more: Any) -> Rows:
        return whole.backward(act, products(layout, block), rows, layout, *more)

    return Kernel(forward, backward, **of_plans)


def _hopper_products(layout: Layout, block: tuple[int, int]) -> whole.Products:
    # Imported here: its part of Pallas is a seventh of a second of a start, and few runs use it.
    from moe_jax.moe.experts import pallas_hopper

    return pallas_hopper.products(layout, block)


KERNELS: dict[str, Kernel] = {
    "blocks": Kernel(blocks.forward, blocks.backward),
    "tiles": Kernel(tiles.forward, tiles.backward, tiles.padded_rows, tiles.round_rows),
    "pallas_tpu": _of_products(pallas_tpu.products, padded_rows=pallas_tpu.padded_rows),
    "pallas_hopper": _of_products(
        _hopper_products, padded_rows=hopper.padded_rows, serves=hopper.serves
    ),
    "ragged_dot": _of_products(ragged.products),
}
BY_PLATFORM = "auto"
# The name of what the backward pass reads of the experts (models/stack.py): the rows that they are
# given, and their pre-activations.
SAVED = "moe_experts"


def kernel_of(name: str, platform: str, case: Case) -> Kernel:
    """Returns the kernel that `_run` takes on a platform."""
    # The matrix unit of a TPU has no float64.
    on_tpu = platform == "tpu" and jnp.dtype(case.dtype) in (jnp.bfloat16, jnp.float32)
    if name == BY_PLATFORM:
        name = "pallas_tpu" if on_tpu else "blocks" if platform == "cpu" else "tiles"
    elif name == "pallas_tpu" and platform != "tpu":
        name = "tiles"
    return _that_serves(name, case)


def _that_serves(name: str, case: Case) -> Kernel:
    """Returns the kernel of a name, or `tiles` where it does not compute the case."""
    kernel = KERNELS[name]
    return kernel if kernel.serves is None or kernel.serves(case) else KERNELS["tiles"]


@functools.cache
def _bound(kernel: Kernel, part: str, chosen: Chosen, block: tuple[int, int]) -> Callable:
    """Returns the "forward" or "backward" part of a kernel: one function for all layers of a model,
    so that jax traces it once.
    """
    return functools.partial(getattr(kernel, part), chosen.function(), block)


def _run(
    name: str, part: str, chosen: Chosen, block: tuple[int, int], rows: Rows, *more: Any
) -> Any:
    """Runs a part of the kernel that a name and the platform choose."""

    def bound(kernel: Kernel) -> Callable[..., Any]:
        return _bound(kernel, part, chosen, block)

    others, tpu = bound(KERNELS["tiles"]), bound(KERNELS["pallas_tpu"])
    if name == "pallas_tpu":
        return by_platform(rows, *more, tpu=tpu, others=others)
    if name != BY_PLATFORM:
        return bound(_that_serves(name, _case(rows, block)))(rows, *more)
    platforms = {"cpu": bound(KERNELS["blocks"])}
    # The matrix unit of a TPU has no float64.
    if rows.x_RD.dtype in (jnp.bfloat16, jnp.float32):
        platforms["tpu"] = tpu
    return by_platform(rows, *more, **platforms, others=others)


def _case(rows: Rows, block: tuple[int, int]) -> Case:
    """Returns what kernels are asked about rows and weights."""
    num_rows, d_model = rows.x_RD.shape
    return Case(
        dtype=rows.x_RD.dtype,
        widths=(d_model, rows.w_out_eFD.shape[1]),
        block=block,
        num_rows=num_rows,
        is_narrow=isinstance(rows.w_out_eFD, narrow.Rounded),
    )


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
    kernel: str = BY_PLATFORM,
    numbers: str = narrow.FULL,
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

    `numbers`: one of narrow.KINDS, of which the products of the forward pass are.
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
    how = _How(chosen, block, kernel, kept.is_named(), numbers)
    return _grouped_ffn(how, rows, Layout(start_e, size_e))


class _How(NamedTuple):
    """Holds what is known of the network before it is compiled."""

    chosen: Chosen
    block: tuple[int, int]
    kernel: str
    # Policies of rematerialisation may keep what the backward pass reads.
    is_named: bool
    # What the factors of the forward products are rounded to.
    numbers: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_ffn(how: _How, rows: Rows, layout: Layout) -> Array:
    y_RD, _ = _forward(how, rows, layout)
    return y_RD


def _forward(how: _How, rows: Rows, layout: Layout) -> tuple[Array, Any]:
    # What the backward pass reads beside weights and gates.
    if how.is_named:
        rows = rows._replace(x_RD=checkpoint_name(rows.x_RD, SAVED))
    used = rows
    if how.numbers != narrow.FULL:
        used = rows._replace(
            w_in_eDH=narrow.rounded(rows.w_in_eDH, 1, how.numbers),
            w_out_eFD=narrow.rounded(rows.w_out_eFD, 1, how.numbers),
        )
    y_RD, pre_RH = _run(how.kernel, "forward", how.chosen, how.block, used, layout)
    if how.is_named:
        pre_RH = checkpoint_name(pre_RH, SAVED)
    return y_RD, (rows, layout, pre_RH)


def _backward(how: _How, residuals: Any, dy_RD: Array) -> tuple[Rows, None]:
    cotangents = _run(how.kernel, "backward", how.chosen, how.block, *residuals, dy_RD)
    # The layout is integers, which have no cotangent.
    return cotangents, None


_grouped_ffn.defvjp(_forward, _backward)
