"""The loss of tokens: -log of the probability that a model gives to the next one.

It is written for memory: logits are the widest arrays of a language model, and every pass over
them counts. Forward, nothing as large is kept beside them; backward writes their gradient in one
pass.

Shapes: B rows, S sequence, V vocabulary (of one device, inside of the shard_map).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.parallel.mesh import P


def negative_log_likelihood(logits_BSV: Array, target_BS: Array) -> Array:
    """Returns -log p(target) in nats, [B, S]; a vocabulary split over `model` is never gathered."""
    if jax.sharding.get_abstract_mesh().empty:
        return _nll_on_device(None, logits_BSV, target_BS)
    batch_axes, row_axes, vocab_axis = jax.typeof(logits_BSV).sharding.spec
    tokens = P(batch_axes, row_axes)
    run = jax.shard_map(
        functools.partial(_nll_on_device, vocab_axis),
        in_specs=(P(batch_axes, row_axes, vocab_axis), tokens),
        out_specs=tokens,
    )
    return run(logits_BSV, target_BS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll_on_device(vocab_axis: str | None, logits_BSV: Array, target_BS: Array) -> Any:
    """`vocab_axis`: the mesh axis that splits the vocabulary; None = none does."""
    nll_BS, _ = _nll_forward(vocab_axis, logits_BSV, target_BS)
    return nll_BS


def _nll_forward(
    vocab_axis: str | None, logits_BSV: Array, target_BS: Array
) -> tuple[Array, tuple[Array, ...]]:
    """Returns (nll, what the backward pass reads): of the probabilities only their sum is kept."""
    local_BS = _local_id(vocab_axis, logits_BSV, target_BS)
    top_BS = jnp.max(logits_BSV, axis=-1)
    if vocab_axis:
        top_BS = lax.pmax(top_BS, vocab_axis)
    sum_BS = jnp.sum(jnp.exp(logits_BSV - top_BS[..., None]), axis=-1)
    # 0 where the target is on another device.
    logit_BS = jnp.take_along_axis(
        logits_BSV, local_BS[..., None], axis=-1, mode="fill", fill_value=0
    )[..., 0]
    if vocab_axis:
        sum_BS, logit_BS = lax.psum((sum_BS, logit_BS), vocab_axis)
    log_sum_BS = top_BS + jnp.log(sum_BS)
    return log_sum_BS - logit_BS, (logits_BSV, target_BS, log_sum_BS)


def _nll_backward(
    vocab_axis: str | None, residuals: tuple[Array, ...], dnll_BS: Array
) -> tuple[Array, None]:
    """The gradient is p - 1 at the target and p elsewhere, written in one pass."""
    logits_BSV, target_BS, log_sum_BS = residuals
    local_BS1 = _local_id(vocab_axis, logits_BSV, target_BS)[..., None]
    is_target_BSV = lax.broadcasted_iota(jnp.int32, logits_BSV.shape, 2) == local_BS1
    prob_BSV = jnp.exp(logits_BSV - log_sum_BS[..., None])
    return (prob_BSV - is_target_BSV.astype(prob_BSV.dtype)) * dnll_BS[..., None], None


_nll_on_device.defvjp(_nll_forward, _nll_backward)


def _local_id(vocab_axis: str | None, logits_BSV: Array, target_BS: Array) -> Array:
    """Returns the place of each target among the logits of this device, or one behind them."""
    if not vocab_axis:
        return target_BS
    num_local = logits_BSV.shape[-1]
    place_BS = target_BS - lax.axis_index(vocab_axis).astype(jnp.int32) * num_local
    # A negative place would count from the end.
    return jnp.where(place_BS >= 0, place_BS, num_local)
