"""The dispatch buffer of one MoE layer on one device: its rows, their bytes, what travels.

Shapes: T tokens of a device in one micro-batch, D model, F expert hidden, R rows of a dispatch
buffer.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.filesize import pick_unit_and_suffix

from moe_jax.models.block import moe_config
from moe_jax.moe.dispatch import DISPATCHERS, LOSSLESS
from moe_jax.moe.dispatch.layout import Shape
from moe_jax.moe.experts import grouped_matmul, narrow
from moe_jax.moe.experts.blocks import block_sizes
from moe_jax.moe.experts.network import Case, KernelSizes
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import RouterCfg, Sizes, Slots, Tokens
from moe_jax.moe.settings import MoE, num_intended
from moe_jax.plan import flops
from moe_jax.plan.hlo.program import Rounds
from moe_jax.plan.traffic import layer_traffic
from moe_jax.schema.config import Config


class Dispatch(NamedTuple):
    """One MoE layer on one device, for one micro-batch."""

    # The buffer's, filled or not.
    rows_held: int
    # What arrives when every expert is chosen equally often.
    rows_balanced: int
    # What arrives when every token chooses the experts of this device.
    rows_worst: int
    # An estimate, see `row_bytes`.
    row_bytes: int
    # Bytes received, by mesh axis.
    forward: Mapping[str, int]
    backward: Mapping[str, int]


def of_layer(cfg: Config) -> Dispatch:
    """Returns the figures of an MoE layer of a config on the current mesh."""
    moe = cfg.model.moe
    shape = buffer_shape(cfg)
    # The backward pass alone cannot be traced: it is what both take beyond the forward pass.
    forward, both_passes = layer_traffic(cfg)
    dispatcher = DISPATCHERS[moe.dispatcher]
    held = dispatcher.rows(shape, moe.dispatcher_options)
    # A dispatcher that mixes tokens into slots gets the same rows whatever the router chooses. For
    # all others the worst case is what the one that never drops makes room for.
    lossless = DISPATCHERS[LOSSLESS]
    assert lossless.worst
    worst = held if dispatcher.mixes else lossless.worst(shape)
    return Dispatch(
        rows_held=held,
        rows_balanced=int(shape.own_intended),
        rows_worst=worst,
        row_bytes=row_bytes(cfg),
        forward=dict(forward),
        backward=dict(both_passes - forward),
    )


def buffer_note(cfg: Config) -> str:
    """Returns the memory of the dispatch buffer in one line of 70 columns, to be told before the
    first step.
    """
    moe = cfg.model.moe
    shape = buffer_shape(cfg)
    held = DISPATCHERS[moe.dispatcher].rows(shape, moe.dispatcher_options)
    size = three_digits(held * row_bytes(cfg))
    return (
        f"{moe.dispatcher}: {held:,} rows, {size}B per MoE layer and device, "
        f"{held / shape.own_intended:.2f} x balanced"
    )


def buffer_shape(cfg: Config) -> Shape:
    """Returns the sizes that a dispatcher works with on one device, for one micro-batch."""
    moe, mesh = moe_config(cfg.model), cfg.mesh
    rows = cfg.train.micro_batch_size // mesh.batch_devices
    num_tokens = rows * cfg.data.seq_len
    num_assignments, per_token = _assignments(moe, rows, cfg.data.seq_len)
    return Shape(
        num_experts=moe.num_experts // mesh.seq,
        num_tokens=num_tokens,
        num_assignments=num_assignments,
        num_intended=num_intended(moe, num_tokens, num_assignments),
        per_token=per_token,
        group_tokens=min(moe.group_rows, rows) * cfg.data.seq_len,
        expert_axis=mesh.expert,
        seq_axis=mesh.seq,
    )


def rows_computed(cfg: Config, platform: str) -> tuple[int, Rounds | None] | None:
    """Returns the rows that the experts of a device compute of a balanced load, with the padding
    of their kernel, and how often its loop runs; None of a kernel whose work the program shows.
    """
    moe, shape = cfg.model.moe, buffer_shape(cfg)
    dispatcher = DISPATCHERS[moe.dispatcher]
    held = dispatcher.rows(shape, moe.dispatcher_options)
    block = block_sizes(shape.mean_load)
    case = Case(
        dtype=jnp.dtype(cfg.model.dtype),
        widths=(cfg.model.expert_dim, moe.expert_hidden // cfg.mesh.model),
        block=block,
        num_rows=held,
        is_narrow=cfg.model.ffn_numbers != narrow.FULL,
    )
    kernel = grouped_matmul.kernel_of(moe.expert_kernel, platform, case)
    if kernel.padded_rows is None or dispatcher.mixes:
        return None
    sizes = KernelSizes(
        num_experts=shape.local_experts,
        block=block,
        num_rows=held,
        num_weights=flops.expert(cfg.model) // cfg.mesh.model,
    )
    padding = kernel.padded_rows(sizes)
    num_rows = min(int(shape.own_intended), held) + padding
    if kernel.round_rows is None:
        return num_rows, None
    round_rows = kernel.round_rows(sizes)
    rounds = Rounds(-(-num_rows // round_rows), -(-(held + padding) // round_rows))
    return num_rows, rounds


def row_bytes(cfg: Config) -> int:
    """Returns the bytes that a row takes in the buffers of a layer, an estimate.

    Counted are the row as it comes in and as it goes out, as wide as the experts' input, and the
    hidden columns of this device before the activation.
    """
    moe = moe_config(cfg.model)
    num_projections = moe.chosen.parts
    width = 2 * moe.expert_dim + num_projections * moe.expert_hidden // cfg.mesh.model
    return width * jnp.dtype(moe.dtype).itemsize


def _assignments(moe: MoE, rows: int, seq_len: int) -> tuple[int, int]:
    """Returns the assignments that a layer's router makes on one device, and how many per token.

    Of a router that fills slots the first is the number of slots. The second is 0 if it varies.
    """
    router = ROUTERS[moe.router]
    num_tokens = rows * seq_len
    sizes = Sizes(moe.d_model, moe.num_experts, moe.vocab_size)

    def whole(z):
        return z

    router_cfg = RouterCfg(
        moe.num_experts, moe.router_options, min(moe.group_rows, rows), moe.vocab_size, whole
    )
    # A routing has numbers that are no arrays, which an abstract evaluation does not return.
    noted: list[tuple[int, int]] = []

    def zeros(declare):
        weights = declare(sizes, moe.router_options)
        return {name: jnp.zeros(weight.shape) for name, weight in weights.items()}

    def route() -> None:
        zero_T = jnp.zeros(num_tokens, jnp.int32)
        valid_T = zero_T == 0
        x_TD = jnp.zeros((num_tokens, moe.d_model))
        tokens = Tokens(x_TD, zero_T, zero_T, zero_T, zero_T, valid_T, rows)
        routing = router.route(
            zeros(router.params),
            zeros(router.state),
            tokens,
            cfg=router_cfg,
            rng=jax.random.key(0),
            train=True,
        )
        if isinstance(routing, Slots):
            num_slots = routing.dispatch_GtEp.size // routing.dispatch_GtEp.shape[1]
            noted.append((num_slots, 0))
        else:
            noted.append((routing.expert_index_N.size, routing.per_token))

    jax.eval_shape(route)  # shapes only: nothing is computed
    return noted[0]


def three_digits(number: int) -> str:
    """Returns three digits and a power of 1000: 1234567 -> "1.23 M"."""
    size, unit = pick_unit_and_suffix(number, ["", "k", "M", "G", "T", "P", "E", "Z"], 1000)
    return f"{number / size:.3g} {unit}".strip()
