"""Faults of dispatch and of the kernels: of capacity, order, gates and masks.

Shapes as in moe/layer.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from moe_jax.models import attention_parts
from moe_jax.moe import layer
from moe_jax.moe.dispatch import DISPATCHERS, dropless_rounds
from moe_jax.moe.experts.grouped_matmul import KERNELS
from moe_jax.moe.layer import Shape
from mutations.contract import DROPLESS, Mutation

SOFT = {"model.moe.router": "soft", "model.moe.dispatcher": "slots", "model.allow_leak": True}
SOFT |= {"model.moe.losses.balance": 0.0, "model.moe.dispatchers.capacity.factor": 1.25}
ARITHMETIC = "the MoE layer equals plain arithmetic over all experts"
CAUSAL = "later tokens change no earlier loss"


def dispatcher(patch, change: Callable[[Any], Any]):
    right = DISPATCHERS["capacity"]

    def wrong(x, routing, experts, **more):
        return right.apply(x, change(routing), experts, **more)

    patch.setitem(DISPATCHERS, "capacity", right._replace(apply=wrong))


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


def capacity_per_device(patch):
    """The tokens of a device share capacity, the usual way: what drops depends on the mesh."""
    patch.setattr(
        layer, "Shape", lambda **sizes: Shape(**(sizes | {"group_tokens": sizes["num_tokens"]}))
    )


def capacity_of_evaluation(patch):
    """In evaluation all rows of a device share capacity."""
    right = layer._on_device

    def wrong(*args, cfg, train, split):
        shared = cfg if train else dataclasses.replace(cfg, group_rows=10**6)
        return right(*args, cfg=shared, train=train, split=split)

    patch.setattr(layer, "_on_device", wrong)


def too_little_room(patch):
    """A device whose experts are chosen half as often again as they should be leaves out what does
    not fit, without a word.
    """
    right = dropless_rounds.worst
    patch.setattr(
        dropless_rounds, "worst", lambda shape: min(right(shape), 3 * shape.num_assignments // 2)
    )


def kernel_without_gates(patch):
    """The grouped product of accelerators, which no CPU runs, forgets the gates."""
    right = KERNELS["tiles"]

    def wrong(act, block, rows, layout):
        ungated = rows._replace(gate_R=jnp.ones_like(rows.gate_R))
        return right.forward(act, block, ungated, layout)

    patch.setitem(KERNELS, "tiles", right._replace(forward=wrong))


def mixed_back_by_dispatch(patch):
    """Soft MoE gives a token the results of the slots with the weights with which it went into
    them.
    """
    right = DISPATCHERS["slots"]

    def wrong(x, slots, experts, **more):
        return right.apply(x, slots._replace(combine_GtEp=slots.dispatch_GtEp), experts, **more)

    patch.setitem(DISPATCHERS, "slots", right._replace(apply=wrong))


def first_documents(patch):
    """Where attention runs over parts of rows and heads, every part sees the documents of the first
    rows.
    """
    right = attention_parts.Part._cut

    def wrong(self, z, row, head):
        # What says which keys are seen has no heads.
        return right(self, z, 0 if z.ndim == 2 else row, head)

    patch.setattr(attention_parts.Part, "_cut", wrong)


def padding_routed(patch):
    right = layer._tokens
    patch.setattr(
        layer,
        "_tokens",
        lambda x, b: right(x, b)._replace(valid_T=jnp.ones_like(right(x, b).valid_T)),
    )


FAULTS = {
    "capacity per device": Mutation(capacity_per_device, "drops", "mesh"),
    "padding routed": Mutation(
        padding_routed,
        "padding changes nothing, gradients included",
        "alone",
        reported="torchtitan #4594",
    ),
    "k-major order": Mutation(k_major, CAUSAL, "alone"),
    "last come, first served": Mutation(last_come_first_served, CAUSAL, "alone", full=True),
    "combined with the wrong gate": Mutation(wrong_gate, ARITHMETIC, "arithmetic"),
    "too little room in dropless": Mutation(too_little_room, "tokens", "mesh", DROPLESS, full=True),
    "an accelerator's kernel without gates": Mutation(
        kernel_without_gates, "and both with the kernel of accelerators", "arithmetic"
    ),
    "documents of another row in attention": Mutation(
        first_documents, "attention in blocks equals attention at once", "attention", full=True
    ),
    "soft MoE combined by dispatch weights": Mutation(
        mixed_back_by_dispatch, ARITHMETIC, "arithmetic", SOFT, full=True
    ),
    "capacity per device in evaluation": Mutation(
        capacity_of_evaluation, "2x2x2 evaluates the same", "evaluation", full=True
    ),
}
