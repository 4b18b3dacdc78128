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
    # The logits say how they are split; nothing here decides it again.
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
    """Returns nll_BS. `vocab_axis`: the mesh axis that splits the vocabulary; None = none does."""
    nll_BS, _ = _nll_forward(vocab_axis, logits_BSV, target_BS)
    return nll_BS


def _nll_forward(
    vocab_axis: str | None, logits_BSV: Array, target_BS: Array
) -> tuple[Array, tuple[Array, ...]]:
    """Returns (nll, what the backward pass reads): of the probabilities only their sum is kept."""
    log_sum_BS, logit_BS = log_sum_and_target(vocab_axis, logits_BSV, target_BS)
    return log_sum_BS - logit_BS, (logits_BSV, target_BS, log_sum_BS)


def _nll_backward(
    vocab_axis: str | None, residuals: tuple[Array, ...], dnll_BS: Array
) -> tuple[Array, None]:
    """Returns the gradient of the logits: p - 1 at the target and p elsewhere, in one pass."""
    logits_BSV, target_BS, log_sum_BS = residuals
    is_target_BSV = is_target(vocab_axis, logits_BSV, target_BS)
    prob_BSV = jnp.exp(logits_BSV - log_sum_BS[..., None])
    return (prob_BSV - is_target_BSV.astype(prob_BSV.dtype)) * dnll_BS[..., None], None


_nll_on_device.defvjp(_nll_forward, _nll_backward)


def log_sum_and_target(vocab_axis: str | None, logits: Array, target: Array) -> tuple[Array, Array]:
    """Returns (the log of the softmax's denominator, the logit of the target) of logits [..., V] of
    one device.
    """
    local_id = _local_id(vocab_axis, logits, target)
    # log sum exp(z) = top + log sum exp(z - top), which does not overflow.
    top = jnp.max(logits, axis=-1)
    if vocab_axis:
        top = lax.pmax(top, vocab_axis)
    total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    # 0 where the target is on another device.
    logit = jnp.take_along_axis(logits, local_id[..., None], axis=-1, mode="fill", fill_value=0)
    logit = logit[..., 0]
    if vocab_axis:
        total, logit = lax.psum((total, logit), vocab_axis)
    return top + jnp.log(total), logit


def is_target(vocab_axis: str | None, logits: Array, target: Array) -> Array:
    """Returns which logits [..., V] of one device are those of the targets."""
    local_id = _local_id(vocab_axis, logits, target)[..., None]
    return lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == local_id


def _local_id(vocab_axis: str | None, logits: Array, target: Array) -> Array:
    """Returns the place of each target among the logits of this device, or one behind them."""
    if not vocab_axis:
        return target
    num_local = logits.shape[-1]
    place = target - lax.axis_index(vocab_axis).astype(jnp.int32) * num_local
    # A negative place would count from the end.
    return jnp.where(place >= 0, place, num_local)
