"""Faults of what devices exchange: of collectives, shards and keys.

Shapes as in moe/layer.py; n length of a mesh axis.
"""

import jax
import jax.numpy as jnp

from moe_jax.models import block, decoder
from moe_jax.moe import layer
from moe_jax.moe.dispatch import chunks, dropless, dropless_gather, exchange, levels, ragged
from moe_jax.moe.experts.grouped_matmul import expert_ffn
from mutations.contract import (
    DROPLESS,
    Mutation,
    batch_devices,
    of_first_shard,
    on_several_devices,
    psum_of,
    times_gradient,
)

E = 8
BY_RAGGED = DROPLESS | {"model.moe.dispatchers.dropless.exchange": "ragged"}
IN_SLICES = DROPLESS | {"model.moe.dispatchers.dropless.slices": 2}


def gradient_times_axis(patch):
    """The backward of the gather over `data` sums what is already a sum: n times the gradient, the
    forward pass untouched.
    """

    def wrong(x, axis, dim):
        y, n = exchange.all_gather(x, axis, dim), jax.lax.axis_size(axis)
        return n * y - jax.lax.stop_gradient((n - 1) * y)

    patch.setattr(layer, "all_gather", wrong)


def slice_off_by_one(patch):
    """With experts on several devices, the slice of each begins one expert late."""
    right = dropless_gather._gather

    def wrong(x_TD, routing, *more):
        if on_several_devices("expert"):
            expert = routing.expert_index_N
            shifted = jnp.where(expert < E, (expert + 1) % E, expert)
            routing = routing._replace(expert_index_N=shifted)
        return right(x_TD, routing, *more)

    patch.setattr(dropless_gather, "_gather", wrong)


def is_one(x):
    return not isinstance(x, tuple)


def no_psum_over_model(patch):
    patch.setattr(jax.lax, "psum", psum_of(is_one, lambda right, x, axis: x))


def one_shard_of_model(patch):
    patch.setattr(jax.lax, "psum", psum_of(is_one, of_first_shard))


def no_psum_over_expert(patch):
    """Each device keeps what its own experts made of its own tokens."""

    def wrong(x, axis, dim, groups):
        del groups
        rows = x.shape[dim] // jax.lax.axis_size(axis)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * rows, rows, dim)

    patch.setattr(levels, "reduce_scatter", wrong)


def gate_and_up_mixed(patch):
    """A fused [E, D, 2F] split over `model`: each device takes its first half for gates, whatever
    the columns were.
    """

    def wrong(x, gate, start, size, w_in, w_out, **more):
        if on_several_devices("model"):
            n, whole = jax.lax.axis_size("model"), exchange.all_gather(w_in, "model", 3)
            fused = whole.reshape(*whole.shape[:2], n, -1)
            mine = jax.lax.dynamic_index_in_dim(
                fused, jax.lax.axis_index("model"), 2, keepdims=False
            )
            w_in = mine.reshape(w_in.shape)
        return expert_ffn(x, gate, start, size, w_in, w_out, **more)

    patch.setattr(layer, "expert_ffn", wrong)


def random_per_device(patch):
    """Dropout folds in the place of a row on its device instead of the row."""
    right = block.dropout

    def wrong(x, rate, rng, row_B):
        return right(x, rate, rng, row_B % (row_B.shape[0] // batch_devices()))

    for module in (block, decoder):
        patch.setattr(module, "dropout", wrong)


def expert_gradients_times_axis(patch):
    """The gradients of the experts are n times what they are, n = devices of the expert axis."""
    right = layer._experts

    def wrong(parts, cfg):
        weights, places = parts
        return right((times_gradient(jax.lax.axis_size("expert"), weights), places), cfg)

    patch.setattr(layer, "_experts", wrong)


def gates_of_other_devices(patch):
    """A gate has no gradient from an expert of another device."""
    right = dropless_gather._gather

    def wrong(x_TD, routing, shape, level):
        x_nTD, gathered = right(x_TD, routing, shape, level)
        device_M = gathered.token_M // shape.num_tokens
        is_own_M = device_M == jax.lax.axis_index("expert")
        gate_M = gathered.gate_M
        gate_M = jnp.where(is_own_M, gate_M, jax.lax.stop_gradient(gate_M))
        return x_nTD, gathered._replace(gate_M=gate_M)

    patch.setattr(dropless_gather, "_gather", wrong)


def lost_backward(patch):
    """Backward, the rows that come from the last device by a ragged exchange are lost, as if its
    writing had been overtaken; the forward pass is untouched.
    """
    right = ragged._backward

    def wrong(num_rows, level, check, residue, dy):
        numbers, num_sent = residue
        start_S, size_S, *others = numbers
        device_S = jnp.arange(size_S.shape[0]) // (size_S.shape[0] // level.size)
        size_S = jnp.where(device_S < level.size - 1, size_S, 0)
        return right(num_rows, level, check, ((start_S, size_S, *others), num_sent), dy)

    patch.setattr(ragged._exchange, "bwd", wrong)


def capacity_per_chunk(patch):
    """The tokens of a chunk share capacity, whatever their groups are."""
    right = chunks._of_chunk

    def wrong(*args):
        shape = right(*args)
        return shape._replace(group_tokens=shape.num_tokens)

    patch.setattr(chunks, "_of_chunk", wrong)


def another_slice(patch):
    """Tokens that cross between slices are given to the experts that have their numbers in the
    slice next to theirs.
    """
    right = dropless._to_slices

    def wrong(x_TD, routing, shape, slow):
        expert = routing.expert_index_N
        shifted = (expert + E // slow.size) % E
        shifted = jnp.where(expert < E, shifted, expert)
        return right(x_TD, routing._replace(expert_index_N=shifted), shape, slow)

    patch.setattr(dropless, "_to_slices", wrong)


def gradient_of_one_shard(patch):
    """What every device of `model` has gets the gradient of the first one's columns alone."""
    right = jax.lax.pcast

    def wrong(x, axis, *, to):
        y = right(x, axis, to=to)
        if "model" not in axis:
            return y
        mine = jax.lax.axis_index("model") == 0
        return jnp.where(mine, y, jax.lax.stop_gradient(y))

    patch.setattr(jax.lax, "pcast", wrong)


def tied_copies(patch):
    """The two uses of a tied table are copies, and the gradient of one is lost."""
    right = decoder.embed

    def wrong(table_VD, id_BS, cfg):
        copy_VD = jax.lax.stop_gradient(table_VD) if batch_devices() > 1 else table_VD
        return right(copy_VD, id_BS, cfg)

    patch.setattr(decoder, "embed", wrong)


FAULTS = {
    "gradient times the axis size": Mutation(
        gradient_times_axis, "gradients", "mesh", reported="pytorch #160285"
    ),
    "expert gradients times the expert axis": Mutation(
        expert_gradients_times_axis,
        "gradients",
        "mesh",
        reported="Megatron-LM #5956",
        full=True,
    ),
    "no gate gradient from other devices": Mutation(
        gates_of_other_devices,
        "gradients",
        "mesh",
        DROPLESS,
        "transformers #48687, torchtitan #2416",
        full=True,
    ),
    "rows of a ragged exchange lost backward": Mutation(
        lost_backward, "gradients", "mesh", BY_RAGGED, "marin #8077, #8081", full=True
    ),
    "tokens to the experts of another slice": Mutation(
        another_slice, "tokens", "mesh", IN_SLICES, full=True
    ),
    "capacity per chunk": Mutation(
        capacity_per_chunk, "drops", "mesh", {"model.moe.overlap_chunks": 2}, full=True
    ),
    "gradient of one shard of model": Mutation(
        gradient_of_one_shard, "gradients", "mesh", reported="Megatron-LM #7452 (11)"
    ),
    "tied table with the gradient of one use": Mutation(
        tied_copies,
        "gradients",
        "mesh",
        {"model.tie_embeddings": True},
        "Megatron-LM #844, piper #13",
        full=True,
    ),
    "expert slice off by one": Mutation(
        slice_off_by_one,
        "tokens",
        "mesh",
        DROPLESS,
        "Megatron-LM #7452 (6, 7), DeepSpeed #6589",
        full=True,
    ),
    "no psum over expert": Mutation(no_psum_over_expert, "tokens", "mesh", DROPLESS),
    "no psum over model": Mutation(no_psum_over_model, "tracing", "mesh"),
    "psum over model of one shard": Mutation(one_shard_of_model, "tokens", "mesh", full=True),
    "gate and up columns mixed": Mutation(gate_and_up_mixed, "tokens", "mesh", full=True),
    "random bits per device": Mutation(
        random_per_device,
        "tokens",
        "mesh",
        reported="transformers #31412, tt-metal #55947",
        full=True,
    ),
}
