"""Faults that parallel mixtures of experts have in practice, planted one at a time, and what of
`verify` must find each.

Shapes as in moe/layer.py; n length of a mesh axis, G devices of the batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import layout, train_step
from moe_jax.models import attention_parts, block, decoder
from moe_jax.moe import layer, load, losses
from moe_jax.moe.dispatch import DISPATCHERS, dropless, exchange
from moe_jax.moe.experts.grouped_matmul import KERNELS, expert_ffn
from moe_jax.moe.layer import Shape
from moe_jax.tasks import TASKS, contract
from moe_jax.tasks.lm import task as lm

DROPLESS = {"model.moe.dispatcher": "dropless", "model.moe.dispatchers.capacity.factor": 1.25}
SOFT = {"model.moe.router": "soft", "model.moe.dispatcher": "slots", "model.allow_leak": True}
SOFT |= {"model.moe.losses.balance": 0.0, "model.moe.dispatchers.capacity.factor": 1.25}
BIASED = {"model.moe.router": "sigmoid", "model.prefix": ("moe",)}
E = 8


def on_several_devices(axis: str) -> bool:
    return jax.lax.axis_size(axis) > 1


def batch_devices() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape["data"] * mesh.shape["expert"]


def gradient_times_axis(patch):
    """The backward of the gather over `data` sums what is already a sum: n times the gradient, the
    forward pass untouched.
    """

    def wrong(x, axis, dim):
        y, n = exchange.all_gather(x, axis, dim), jax.lax.axis_size(axis)
        return n * y - jax.lax.stop_gradient((n - 1) * y)

    patch.setattr(layer, "all_gather", wrong)


def statistics_per_device(patch):
    """The balance loss of each device's rows, averaged over devices."""
    right = load.totals

    def wrong(sums_LB):
        if not sums_LB:
            return right(sums_LB)

        def part(z):
            return z.reshape((z.shape[0], batch_devices(), -1) + z.shape[2:]).sum(2)

        counts, probs, tokens = (part(sums_LB[name]) for name in ("counts", "probs", "tokens"))
        return right(sums_LB) | {"wrong": load.product(counts, probs, tokens).mean(1)}

    patch.setattr(load, "totals", wrong)
    balance = losses.LOSSES["balance"]._replace(value=lambda totals: totals["wrong"])
    patch.setitem(losses.LOSSES, "balance", balance)


def slice_off_by_one(patch):
    """With experts on several devices, the slice of each begins one expert late."""
    right = dropless._gather

    def wrong(x_TD, routing, shape):
        if on_several_devices("expert"):
            expert = routing.expert_index_N
            shifted = jnp.where(expert < E, (expert + 1) % E, expert)
            routing = routing._replace(expert_index_N=shifted)
        return right(x_TD, routing, shape)

    patch.setattr(dropless, "_gather", wrong)


def psum_of(wanted, wrong):
    """A `jax.lax.psum` that is `wrong(right, x, axis)` over `model` where `wanted(x)`.

    The layer sums one array over `model`, the loss of tokens a pair.
    """
    right = jax.lax.psum

    def psum(x, axis, **more):
        if axis == "model" and wanted(x):
            return wrong(right, x, axis)
        return right(x, axis, **more)

    return psum


def is_one(x):
    return not isinstance(x, tuple)


def is_pair(x):
    return isinstance(x, tuple)


def of_first_shard(right, x, axis):
    """As if the psum were missing, in a way that jax's check of replication cannot see: the part of
    the first shard alone.
    """
    mine = jax.lax.axis_index("model") == 0
    return right(jax.tree.map(lambda z: jnp.where(mine, z, 0), x), axis)


def no_psum_over_model(patch):
    patch.setattr(jax.lax, "psum", psum_of(is_one, lambda right, x, axis: x))


def one_shard_of_model(patch):
    patch.setattr(jax.lax, "psum", psum_of(is_one, of_first_shard))


def one_shard_of_vocabulary(patch):
    patch.setattr(jax.lax, "psum", psum_of(is_pair, of_first_shard))


def no_psum_over_expert(patch):
    """Each device keeps what its own experts made of its own tokens."""

    def wrong(x, axis, dim):
        rows = x.shape[dim] // jax.lax.axis_size(axis)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * rows, rows, dim)

    patch.setattr(dropless, "reduce_scatter", wrong)


def padding_routed(patch):
    right = layer._tokens
    patch.setattr(
        layer,
        "_tokens",
        lambda x, b: right(x, b)._replace(valid_T=jnp.ones_like(right(x, b).valid_T)),
    )


def padding_in_loss(patch):
    def wrong(*args):
        found = lm.losses(*args)
        return found._replace(weight=jnp.ones_like(found.weight))

    patch.setitem(TASKS, "lm", lm.TASK._replace(losses=wrong))


def random_per_device(patch):
    """Dropout folds in the place of a row on its device instead of the row."""
    right = block.dropout

    def wrong(x, rate, rng, row_B):
        return right(x, rate, rng, row_B % (row_B.shape[0] // batch_devices()))

    for module in (block, decoder):
        patch.setattr(module, "dropout", wrong)


def wrong_gate(patch):
    """The gates of a token's two choices are exchanged."""

    def swap(gate_N):
        return gate_N.reshape(-1, 2)[:, ::-1].reshape(-1)

    dispatcher(patch, lambda routing: routing._replace(gate_N=swap(routing.gate_N)))


def k_major(patch):
    """All first choices before all second ones: a later token's first choice takes the place of an
    earlier one's second.
    """

    def order(n):
        return jnp.arange(n, dtype=jnp.int32).reshape(-1, 2).T.reshape(-1)

    dispatcher(patch, lambda routing: routing._replace(order_N=order(routing.token_N.shape[0])))


def last_come_first_served(patch):
    """Of the assignments of an expert the last of a group win."""
    dispatcher(
        patch,
        lambda routing: routing._replace(
            order_N=jnp.arange(routing.token_N.shape[0], dtype=jnp.int32)[::-1]
        ),
    )


def dispatcher(patch, change: Callable[[Any], Any]):
    right = DISPATCHERS["capacity"]

    def wrong(x, routing, experts, **more):
        return right.apply(x, change(routing), experts, **more)

    patch.setitem(DISPATCHERS, "capacity", right._replace(apply=wrong))


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


def capacity_per_device(patch):
    """The tokens of a device share capacity, the usual way: what drops depends on the mesh."""
    patch.setattr(
        layer, "Shape", lambda **sizes: Shape(**(sizes | {"group_tokens": sizes["num_tokens"]}))
    )


def plain_accumulation(patch):
    """The mean of the losses of the micro-batches: a balance loss is a product of sums, which does
    not add up.
    """
    right = train_step.make_loss

    def wrong(cfg, model):
        num = cfg.train.num_micro_batches
        if num == 1:
            return right(cfg, model)

        def loss(params, router_state, batch, rng):
            micro = train_step.micro_batches(batch, num, cfg.model.moe.group_rows)
            each = [jax.tree.map(lambda z, i=i: z[i], micro) for i in range(num)]
            totals = [
                contract.forward(lm.TASK, model.bind(params, router_state), one, rng)
                for one in each
            ]
            values = [contract.objective(one, cfg.model.moe.losses) for one in totals]
            whole = jax.tree.map(lambda *z: sum(z), *totals)
            return sum(value for value, _ in values) / num, (whole, values[0][1])

        return loss

    patch.setattr(train_step, "make_loss", wrong)


def too_little_room(patch):
    """A device whose experts are chosen half as often again as they should be leaves out what does
    not fit, without a word.
    """
    right = dropless.worst
    patch.setattr(
        dropless, "worst", lambda shape: min(right(shape), 3 * shape.num_assignments // 2)
    )


def kernel_without_gates(patch):
    """The grouped product of accelerators, which no CPU runs, forgets the gates."""
    right = KERNELS["tiles"]

    def wrong(act, block, rows, layout):
        ungated = rows._replace(gate_R=jnp.ones_like(rows.gate_R))
        return right.forward(act, block, ungated, layout)

    patch.setitem(KERNELS, "tiles", right._replace(forward=wrong))


def first_documents(patch):
    """Where attention runs over parts of rows and heads, every part sees the documents of the first
    rows.
    """
    right = attention_parts.Part._cut

    def wrong(self, z, row, head):
        # What says which keys are seen has no heads.
        return right(self, z, 0 if z.ndim == 2 else row, head)

    patch.setattr(attention_parts.Part, "_cut", wrong)


def mixed_back_by_dispatch(patch):
    """Soft MoE gives a token the results of the slots with the weights with which it went into
    them.
    """
    right = DISPATCHERS["slots"]

    def wrong(x, slots, experts, **more):
        return right.apply(x, slots._replace(combine_GtEp=slots.dispatch_GtEp), experts, **more)

    patch.setitem(DISPATCHERS, "slots", right._replace(apply=wrong))


def state_of_another_layer(patch):
    """The states of the routers are taken in the opposite order of the layers."""
    right = layout.moe_layer_numbers
    patch.setattr(
        layout, "moe_layer_numbers", lambda keys, cfg: cfg.num_moe_layers - 1 - right(keys, cfg)
    )


def capacity_of_evaluation(patch):
    """In evaluation all rows of a device share capacity."""
    right = layer._on_device

    def wrong(*args, cfg, train):
        return right(
            *args, cfg=cfg if train else dataclasses.replace(cfg, group_rows=10**6), train=train
        )

    patch.setattr(layer, "_on_device", wrong)


def metrics_of_one_micro_batch(patch):
    """What is logged of the load is that of the last micro-batch; the loss and its gradients are
    right.
    """
    right = train_step.make_loss

    def wrong(cfg, model):
        num = cfg.train.num_micro_batches

        def loss(params, router_state, batch, rng):
            value, (totals, parts) = right(cfg, model)(params, router_state, batch, rng)
            last = jax.tree.map(
                lambda z: z[-1], train_step.micro_batches(batch, num, cfg.model.moe.group_rows)
            )
            found = contract.forward(lm.TASK, model.bind(params, router_state), last, rng)
            return value, (totals if num == 1 else totals | {"moe": found["moe"]}, parts)

        return loss

    patch.setattr(train_step, "make_loss", wrong)


class Mutation(NamedTuple):
    plant: Callable[[Any], None]
    found_by: str  # "tracing", a check of compare.LIMITS, or a claim about one device
    # "mesh", "layout" (one device, accumulated), "alone" (one device), or a function of PARTS in
    # test_mutations.py
    where: str
    changes: dict[str, Any]  # of the config


MUTATIONS: dict[str, Mutation] = {
    "gradient times the axis size": Mutation(gradient_times_axis, "gradients", "mesh", {}),
    "balance statistics per device": Mutation(statistics_per_device, "forward", "mesh", {}),
    "capacity per device": Mutation(capacity_per_device, "drops", "mesh", {}),
    "expert slice off by one": Mutation(slice_off_by_one, "tokens", "mesh", DROPLESS),
    "no psum over expert": Mutation(no_psum_over_expert, "tokens", "mesh", DROPLESS),
    "no psum over model": Mutation(no_psum_over_model, "tracing", "mesh", {}),
    "psum over model of one shard": Mutation(one_shard_of_model, "tokens", "mesh", {}),
    "loss of one shard of the vocabulary": Mutation(one_shard_of_vocabulary, "tokens", "mesh", {}),
    "gate and up columns mixed": Mutation(gate_and_up_mixed, "tokens", "mesh", {}),
    "random bits per device": Mutation(random_per_device, "tokens", "mesh", {}),
    "mean of micro-batch losses": Mutation(plain_accumulation, "forward", "layout", {}),
    "padding routed": Mutation(
        padding_routed, "padding changes nothing, gradients included", "alone", {}
    ),
    "padding in the loss": Mutation(
        padding_in_loss, "the loss is the mean over predictions that are not padding", "alone", {}
    ),
    "k-major order": Mutation(k_major, "later tokens change no earlier loss", "alone", {}),
    "last come, first served": Mutation(
        last_come_first_served, "later tokens change no earlier loss", "alone", {}
    ),
    "combined with the wrong gate": Mutation(
        wrong_gate, "the MoE layer equals plain arithmetic over all experts", "arithmetic", {}
    ),
    "too little room in dropless": Mutation(too_little_room, "tokens", "mesh", DROPLESS),
    "an accelerator's kernel without gates": Mutation(
        kernel_without_gates, "and both with the kernel of accelerators", "arithmetic", {}
    ),
    "documents of another row in attention": Mutation(
        first_documents, "attention in blocks equals attention at once", "attention", {}
    ),
    "soft MoE combined by dispatch weights": Mutation(
        mixed_back_by_dispatch,
        "the MoE layer equals plain arithmetic over all experts",
        "arithmetic",
        SOFT,
    ),
    "router state of another layer": Mutation(
        state_of_another_layer,
        "each router's state follows the load of its own layer",
        "alone",
        BIASED,
    ),
    "capacity per device in evaluation": Mutation(
        capacity_of_evaluation, "2x2x2 evaluates the same", "evaluation", {}
    ),
    "metrics of one micro-batch": Mutation(metrics_of_one_micro_batch, "sums", "layout", {}),
}
