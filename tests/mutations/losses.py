"""Faults of losses and of what is told of them: of means, masks, coefficients and accumulation.

Shapes as in moe/layer.py.
"""

import jax
import jax.numpy as jnp

from moe_jax import train_step
from moe_jax.moe import load, losses
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.tasks import TASKS, contract
from moe_jax.tasks.lm import task as lm
from mutations.contract import Mutation, batch_devices, length, of_first_shard, psum_of


def is_pair(x):
    return isinstance(x, tuple)


def one_shard_of_vocabulary(patch):
    patch.setattr(jax.lax, "psum", psum_of(is_pair, of_first_shard))


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


def padding_in_loss(patch):
    def wrong(*args):
        found = lm.losses(*args)
        return found._replace(weight=jnp.ones_like(found.weight))

    patch.setitem(TASKS, "lm", lm.TASK._replace(losses=wrong))


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


def gathered_vocabulary(patch):
    """The loss of a split vocabulary is given all of it on every device: each probability is
    divided by n, and the loss is log n too large.
    """

    def wrong(right, x, axis):
        sum_BS, logit_BS = x
        return right((sum_BS * jax.lax.axis_size(axis), logit_BS), axis)

    patch.setattr(jax.lax, "psum", psum_of(is_pair, wrong))


def mean_of_means(patch):
    """Every device divides by the number of its own predictions."""

    def wrong(*args):
        found = lm.losses(*args)
        weight_BS = found.weight
        shape = (batch_devices(), -1, weight_BS.shape[1])
        weight_GbS = jnp.reshape(weight_BS, shape, out_sharding=P(BATCH))
        # A device with few predictions counts as much as one with many.
        mine_G = weight_GbS.sum((1, 2))
        factor_G = weight_BS.sum() / batch_devices() / jnp.maximum(mine_G, 1)
        weight_GbS = weight_GbS * factor_G[:, None, None]
        return found._replace(
            weight=jnp.reshape(weight_GbS, weight_BS.shape, out_sharding=P(BATCH))
        )

    patch.setitem(TASKS, "lm", lm.TASK._replace(losses=wrong))


def auxiliary_by_devices(patch):
    """The gradient of the auxiliary losses is divided by the devices of the batch."""
    right = losses.auxiliary

    def wrong(totals, coefficients):
        value, values = right(totals, coefficients)
        part = value / batch_devices()
        return part + jax.lax.stop_gradient(value - part), values

    patch.setattr(losses, "auxiliary", wrong)


def auxiliary_of_every_micro_batch(patch):
    """The auxiliary losses count once for every micro-batch."""
    right = train_step.make_loss

    def wrong(cfg, model):
        def loss(params, router_state, batch, rng):
            value, (totals, parts) = right(cfg, model)(params, router_state, batch, rng)
            auxiliary, _ = losses.auxiliary(totals["moe"], cfg.model.moe.losses)
            return value + (cfg.train.num_micro_batches - 1) * auxiliary, (totals, parts)

        return loss

    patch.setattr(train_step, "make_loss", wrong)


def accumulated_in_bfloat16(patch):
    """The gradients of micro-batches are added up in bfloat16; the forward pass is exact."""
    right = train_step.make_loss

    def wrong(cfg, model):
        def bind(pairs, router_state):
            narrow, rest = pairs
            exact = jax.tree.map(lambda n, r: n.astype(r.dtype) + r, narrow, rest)
            return model.bind(exact, router_state)

        def loss(params, router_state, batch, rng):
            narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
            rest = jax.tree.map(
                lambda w, n: jax.lax.stop_gradient(w - n.astype(w.dtype)), params, narrow
            )
            own = right(cfg, model._replace(bind=bind))
            return own((narrow, rest), router_state, batch, rng)

        return loss if cfg.train.num_micro_batches > 1 else right(cfg, model)

    patch.setattr(train_step, "make_loss", wrong)


def displayed_by_shards(patch):
    """The loss that is told is divided by the devices of `model`; the one that is trained on is
    right.
    """
    right = train_step.make_step

    def wrong(cfg, model, tx):
        step = right(cfg, model, tx)

        def told(state, batch):
            new, metrics = step(state, batch)
            return new, metrics | {"loss": metrics["loss"] / length("model")}

        return told

    patch.setattr(train_step, "make_step", wrong)


FAULTS = {
    "vocabulary gathered before its split loss": Mutation(
        gathered_vocabulary,
        "tokens",
        "mesh",
        reported="Megatron-LM #7452 (2)",
        full=True,
    ),
    "loss of one shard of the vocabulary": Mutation(one_shard_of_vocabulary, "tokens", "mesh"),
    "mean of the devices' means": Mutation(
        mean_of_means, "forward", "mesh", reported="Megatron-LM #7452 (3, 9), #673", full=True
    ),
    "told loss divided by the model axis": Mutation(
        displayed_by_shards,
        "forward",
        "mesh",
        reported="torchtitan #3280",
        full=True,
    ),
    "balance statistics per device": Mutation(statistics_per_device, "forward", "mesh", full=True),
    "auxiliary gradient divided by devices": Mutation(
        auxiliary_by_devices,
        "gradients",
        "mesh",
        reported="Megatron-LM #7452 (10), Automodel #1412",
        full=True,
    ),
    "auxiliary loss of every micro-batch": Mutation(
        auxiliary_of_every_micro_batch,
        "forward",
        "layout",
        reported="Automodel #3359, Megatron-LM #5798",
        full=True,
    ),
    "mean of micro-batch losses": Mutation(
        plain_accumulation,
        "forward",
        "layout",
        reported="transformers #24725, #34191",
    ),
    "gradients accumulated in bfloat16": Mutation(
        accumulated_in_bfloat16, "gradients", "layout", reported="DeepSpeed #1800", full=True
    ),
    "metrics of one micro-batch": Mutation(metrics_of_one_micro_batch, "sums", "layout", full=True),
    "padding in the loss": Mutation(
        padding_in_loss, "the loss is the mean over predictions that are not padding", "alone"
    ),
}
