"""Faults of rows that are split over `seq`: of keys, places, statistics and losses.

Shapes as in moe_jax/parallel/context.py.
"""

import jax
import jax.numpy as jnp

from moe_jax.models import attention, attention_core, mtp
from moe_jax.moe import split_rows
from moe_jax.parallel import context
from moe_jax.tasks import next_token
from mutations.contract import Mutation, length


def keys_of_this_device(patch):
    """Keys and values are not gathered: each device sees its own, as often as there are devices."""

    def wrong(k_BTGA):
        return jnp.concatenate([k_BTGA] * jax.lax.axis_size(context.AXIS), axis=1)

    patch.setattr(attention, "whole_rows", wrong)


def keys_out_of_order(patch):
    """Gathered keys lie as devices have them, and are taken for the row."""
    patch.setattr(context, "reordered", lambda z_BS, n: z_BS)


def places_of_this_device(patch):
    """A query's place among the tokens of its device is taken for that in the row."""
    right = attention_core.of_own

    def wrong(keys):
        found = right(keys)
        place_1T = jnp.arange(found.first_BT.shape[1], dtype=found.first_BT.dtype)[None]
        last_BT = jnp.broadcast_to(place_1T, found.first_BT.shape)
        return found._replace(last_BT=last_BT)

    patch.setattr(attention, "of_own", wrong)


def statistics_of_every_device(patch):
    """Statistics that every device of `seq` has computed of the same rows are added up."""

    def wrong(sums):
        def one(z):
            number = z.astype(jnp.int32) if z.dtype == bool else z
            return jax.lax.psum(number, context.AXIS).astype(z.dtype)

        return {name: one(z) for name, z in sums.items()}

    patch.setattr(split_rows, "said_once", wrong)


def loss_of_every_device(patch):
    """The loss is a mean over devices of sums, and not of tokens: with rows split over two it is
    halved.
    """
    right = next_token.context.whole

    def wrong(z_BS):
        found = right(z_BS)
        is_loss = context.is_split(z_BS) and jnp.issubdtype(z_BS.dtype, jnp.floating)
        return found / context.length() if is_loss else found

    patch.setattr(context, "whole", wrong)


def key_gradients_of_this_device(patch):
    """Keys and values have no gradient from the queries of other devices."""
    right = attention.whole_rows

    def wrong(k_BTGA):
        n, mine = jax.lax.axis_size(context.AXIS), jax.lax.axis_index(context.AXIS)
        whole_BSGA = right(jax.lax.stop_gradient(k_BTGA))
        # A zero with the gradient of one, at the places of this device alone.
        zero_BTGA = k_BTGA - jax.lax.stop_gradient(k_BTGA)
        parts = [jnp.where(mine == i, zero_BTGA, 0) for i in range(n)]
        return whole_BSGA + context.reordered(jnp.concatenate(parts, axis=1), n)

    patch.setattr(attention, "whole_rows", wrong)


def further_tokens_of_this_device(patch):
    """The token that stands k places later is looked for in the part of the row of one device."""
    right = mtp.ahead

    def wrong(z_BS, k):
        parts = jnp.split(z_BS, length(context.AXIS), axis=1)
        return jnp.concatenate([right(part_BT, k) for part_BT in parts], axis=1)

    patch.setattr(mtp, "ahead", wrong)


FAULTS = {
    "keys of the own part of a row": Mutation(keys_of_this_device, "tokens", "context"),
    "keys in the order of devices": Mutation(keys_out_of_order, "tokens", "context", full=True),
    "places in the own part of a row": Mutation(
        places_of_this_device, "tokens", "context", full=True
    ),
    "no key gradient from other parts of a row": Mutation(
        key_gradients_of_this_device, "gradients", "context", full=True
    ),
    "statistics of every part of a row": Mutation(
        statistics_of_every_device, "counts", "context", full=True
    ),
    "further tokens of the own part of a row": Mutation(
        further_tokens_of_this_device,
        "tokens",
        "context",
        {"model.kinds.decoder.mtp_depths": 1},
        full=True,
    ),
    "loss divided by the parts of a row": Mutation(
        loss_of_every_device, "tokens", "context", reported="torchtitan #3280", full=True
    ),
}
