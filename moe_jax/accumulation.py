"""Gradients of a batch that is computed in micro-batches.

The objective is a function of sums over the whole batch. Where it only divides them by numbers of
tokens, rows and micro-batches, the gradient of the batch is the sum of those of its micro-batches:
each is computed forward and backward while its activations are there. A loss that multiplies sums
(`balance` of the global batch) needs all of them before the first backward pass, so that every
micro-batch is computed twice (train_step.make_loss).

Shapes: B rows of the batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.models.functions import Model
from moe_jax.moe.losses import LOSSES
from moe_jax.moe.routing import ROUTERS
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.precision import wide_dtype
from moe_jax.schema.config import Config
from moe_jax.tasks import TASKS, contract


def micro_batches(batch: Any, num: int, group_rows: int) -> Any:
    """Returns arrays [B, ...] as [num, B / num, ...], by strided groups of rows.

    So every device keeps its own rows, and no group is split.
    """

    def split(z: jax.Array) -> jax.Array:
        # Told where, both times: with a dimension of length one (one group, one row) a reshape
        # forgets what was split.
        groups = (z.shape[0] // (num * group_rows), num, group_rows)
        # [B, ...] -> [n, num, group_rows, ...]: of num groups in a row, micro-batch i takes the
        # i-th. Of 8 rows, with num 2 and groups of one: rows 0 2 4 6, and rows 1 3 5 7.
        z = jnp.reshape(z, groups + z.shape[1:], out_sharding=P(BATCH))
        return jnp.reshape(z.swapaxes(0, 1), (num, -1) + z.shape[3:], out_sharding=P(None, BATCH))

    return jax.tree.map(split, batch)


def first_of(micro: Any) -> Any:
    """Returns the first of `micro_batches`."""
    # An index forgets what was split, too, where a dimension is of length one (jax 0.12).
    return jax.tree.map(lambda z: jax.sharding.reshard(z[0], P(BATCH)), micro)


def zeros_of(abstract: Any) -> Any:
    """Returns zeros of the shapes and dtypes of a pass that is only traced."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract)


def forward_passes(cfg: Config) -> int:
    """Returns how often a step computes the forward pass of every micro-batch, beside what
    model.remat computes again: once where the gradients of micro-batches add up to that of the
    batch, else twice.
    """
    model = cfg.model
    if cfg.train.num_micro_batches == 1 or not model.num_moe_layers:
        return 1
    # ReLU routing brings a product of two sums along (losses/l1.py).
    brings_product = ROUTERS[model.moe.router].own_loss
    used = [LOSSES[name] for name, factor in model.moe.losses.items() if factor]
    return 2 if brings_product or not all(loss.adds_up for loss in used) else 1


def make_forward(cfg: Config, model: Model) -> Callable[..., dict[str, Any]]:
    """Returns a function: (params, router state, micro-batch, rng) -> its sums.

    It is jitted, so that it is traced once, however often a step asks for it.
    """
    task = TASKS[cfg.task]

    @jax.jit
    def forward(params: Any, router_state: Any, micro: Any, rng: jax.Array) -> dict[str, Any]:
        return contract.forward(task, model.bind(params, router_state), micro, rng)

    return forward


def make_gradient(
    cfg: Config, model: Model, loss: Callable[..., tuple[jax.Array, Any]]
) -> Callable[..., tuple[tuple[jax.Array, Any], Any]]:
    """Returns a function: (params, router state, batch, rng) -> ((value, aux), gradients).

    `loss` is train_step.make_loss of the config, and the function has the results of
    `jax.value_and_grad(loss, has_aux=True)`.
    """
    num, coefficients = cfg.train.num_micro_batches, cfg.model.moe.losses
    # A pipeline adds up sums, and not gradients, whatever the losses are.
    if num == 1 or forward_passes(cfg) > 1 or cfg.mesh.stage > 1:
        return jax.value_and_grad(loss, has_aux=True)

    of_micro = make_forward(cfg, model)

    def gradient(params: Any, router_state: Any, batch: Any, rng: jax.Array) -> Any:
        def forward(params: Any, micro: Any) -> dict[str, Any]:
            return of_micro(params, router_state, micro, rng)

        micro = micro_batches(batch, num, cfg.model.moe.group_rows)
        abstract = jax.eval_shape(forward, params, first_of(micro))

        # What sums are divided by is needed first. It is made of the batch alone, and the compiler
        # leaves out all of the model that it does not need.
        def count(sums: Any, micro: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, contract.numbers(forward(params, micro))), None

        numbers, _ = jax.lax.scan(count, contract.numbers(zeros_of(abstract)), micro)

        def value(totals: Any) -> jax.Array:
            return contract.objective(contract.with_numbers(totals, numbers), coefficients)[0]

        # The same at all totals, as the objective adds up: of every total, what it counts for.
        weights = jax.grad(value)(zeros_of(abstract))

        def body(sums: Any, micro: Any) -> tuple[Any, None]:
            totals, pull = jax.vjp(lambda params: forward(params, micro), params)
            return jax.tree.map(_add, sums, (totals, *pull(weights))), None

        # Gradients are added up in a wide dtype.
        none = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=wide_dtype(x.dtype)), params)
        (totals, gradients), _ = jax.lax.scan(body, (zeros_of(abstract), none), micro)
        loss_value, parts = contract.objective(totals, coefficients)
        gradients = jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, params)
        return (loss_value, (totals, parts)), gradients

    return gradient


def _add(total: jax.Array, addend: jax.Array) -> jax.Array:
    """Returns the sum in the dtype of the total, which is the wider one."""
    return total + addend.astype(total.dtype)
