"""The loss of tokens without their logits: the head and the loss in chunks of tokens.

Logits of one chunk exist at a time, forward and backward; the backward pass computes them again, a
third more work of the head, and nothing else is kept of them but one number a token. Memory is
linear in the tokens and in the vocabulary, and never their product. A soft cap on logits
(models/soft_cap.py) is a part of both passes.

Shapes: B rows, S sequence, T tokens of a device, C tokens of a chunk, V vocabulary (of one device,
inside of the shard_map).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.models.ends import Hidden
from moe_jax.models.soft_cap import pulled_back, soft_cap
from moe_jax.parallel.mesh import P
from moe_jax.parallel.varying import vary_alike
from moe_jax.precision import wide_dtype
from moe_jax.tasks.cross_entropy import is_target, log_sum_and_target


class Head(NamedTuple):
    """Holds what is known of the head before it is compiled."""

    # The mesh axis that splits the vocabulary; None = none does.
    vocab_axis: str | None
    # A soft cap on logits; 0 = there is none.
    cap: float


def of_hidden(
    last: Hidden, target_BS: Array, chunk: int, greedy: bool, cap: float = 0.0
) -> tuple[Array, Array, Any]:
    """Returns (-log p(target) in nats, the log of the softmax's denominator, the likeliest token),
    each [B, S]; the last one is () unless `greedy` asks for it.

    `chunk` tokens of a device at a time; a vocabulary split over `model` is never gathered. `cap`:
    of the logits, model.logit_cap; 0 = there is none.
    """
    if jax.sharding.get_abstract_mesh().empty:
        # Without a mesh nothing is split.
        return _on_device(last.x_BSD, last.head_DV, target_BS, Head(None, cap), chunk, greedy)
    # Each device cuts its own tokens, so that no chunk is of several devices.
    x_spec = jax.typeof(last.x_BSD).sharding.spec
    head_spec = jax.typeof(last.head_DV).sharding.spec
    tokens = P(*x_spec[:2])
    run = jax.shard_map(
        functools.partial(_on_device, how=Head(head_spec[1], cap), chunk=chunk, greedy=greedy),
        in_specs=(x_spec, head_spec, tokens),
        out_specs=(tokens, tokens, tokens if greedy else ()),
    )
    return run(last.x_BSD, last.head_DV, target_BS)


def _on_device(
    x_BSD: Array,
    head_DV: Array,
    target_BS: Array,
    how: Head,
    chunk: int,
    greedy: bool,
) -> tuple[Array, Array, Any]:
    """Cuts the tokens of a device into chunks of equal length; padding fills up the last one."""
    num_tokens = target_BS.size
    # Chunks of equal length, so that at most one token of each is padding.
    num_chunks = -(-num_tokens // chunk)
    length = -(-num_tokens // num_chunks)
    padding = num_chunks * length - num_tokens

    def cut(z_BS: Array) -> Array:
        z_T = z_BS.reshape((num_tokens,) + z_BS.shape[2:])
        # `join` cuts the padding off, so it gets a gradient of zero.
        z_T = jnp.pad(z_T, [(0, padding)] + [(0, 0)] * (z_T.ndim - 1))
        return z_T.reshape((num_chunks, length) + z_T.shape[1:])

    def join(z_nC: Array) -> Array:
        return z_nC.reshape(-1)[:num_tokens].reshape(target_BS.shape)

    # The sums of gradients over devices are the transpose of this.
    x_nCD, head_DV, target_nC = vary_alike(cut(x_BSD), head_DV, cut(target_BS))
    nll_nC, log_sum_nC = _losses(how, x_nCD, head_DV, target_nC)
    best = join(_likeliest(how, x_nCD, head_DV)) if greedy else ()
    return join(nll_nC), join(log_sum_nC), best


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(how: Head, x_nCD: Array, head_DV: Array, target_nC: Array) -> tuple[Array, Array]:
    """Returns (-log p(target), the log of the denominator) [n, C]."""

    def step(carry: tuple[()], chunk: tuple[Array, Array]) -> tuple[tuple[()], Any]:
        x_CD, target_C = chunk
        logits_CV = _logits(x_CD, head_DV, how.cap)
        log_sum_C, logit_C = log_sum_and_target(how.vocab_axis, logits_CV, target_C)
        return carry, (log_sum_C - logit_C, log_sum_C)

    _, losses = lax.scan(step, (), (x_nCD, target_nC))
    return losses


def _forward(how: Head, *inputs: Array) -> tuple[tuple[Array, Array], Any]:
    """Returns (losses, what the backward pass reads): of the logits one number a token."""
    nll_nC, log_sum_nC = _losses(how, *inputs)
    return (nll_nC, log_sum_nC), (*inputs, log_sum_nC)


def _backward(how: Head, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    """Returns the gradients. That of the logits is p (dnll + dlog_sum), less dnll at the target."""
    x_nCD, head_DV, target_nC, log_sum_nC = residuals

    def step(dhead_DV: Array, chunk: Any) -> tuple[Array, Array]:
        x_CD, target_C, log_sum_C, dnll_C, dlog_sum_C = chunk
        # The logits once more, and with the denominator that was kept their probabilities.
        logits_CV = _logits(x_CD, head_DV, how.cap)
        prob_CV = jnp.exp(logits_CV - log_sum_C[:, None])
        both_C1 = (dnll_C + dlog_sum_C)[:, None]
        is_target_CV = is_target(how.vocab_axis, prob_CV, target_C)
        dlogits_CV = prob_CV * both_C1 - jnp.where(is_target_CV, dnll_C[:, None], 0)
        dlogits_CV = pulled_back(dlogits_CV, logits_CV, how.cap).astype(x_CD.dtype)
        with jax.named_scope("head"):
            dx_CD = _product(dlogits_CV, head_DV, 1, 1).astype(x_CD.dtype)
            return dhead_DV + _product(x_CD, dlogits_CV, 0, 0), dx_CD

    # Summed over the chunks, so in a wide dtype.
    zero_DV = jnp.zeros_like(head_DV, dtype=wide_dtype(head_DV.dtype))
    chunks = (x_nCD, target_nC, log_sum_nC, *cotangents)
    dhead_DV, dx_nCD = lax.scan(step, zero_DV, chunks)
    return dx_nCD, dhead_DV.astype(head_DV.dtype), None


_losses.defvjp(_forward, _backward)


def _likeliest(how: Head, x_nCD: Array, head_DV: Array) -> Array:
    """Returns the token with the largest logit [n, C]; the first of several."""
    # An id has no gradient.
    x_nCD, head_DV = lax.stop_gradient((x_nCD, head_DV))

    def step(carry: tuple[()], x_CD: Array) -> tuple[tuple[()], Array]:
        logits_CV = _logits(x_CD, head_DV, how.cap)
        id_C = jnp.argmax(logits_CV, axis=-1).astype(jnp.int32)
        if not how.vocab_axis:
            return carry, id_C
        top_C = jnp.max(logits_CV, axis=-1)
        # Numbered in the whole vocabulary, of which this device has a part.
        id_C = id_C + lax.axis_index(how.vocab_axis).astype(jnp.int32) * head_DV.shape[1]
        # An id of a device whose largest logit is not the largest of all is behind all others.
        is_top_C = top_C == lax.pmax(top_C, how.vocab_axis)
        last = jnp.iinfo(jnp.int32).max
        return carry, lax.pmin(jnp.where(is_top_C, id_C, last), how.vocab_axis)

    _, id_nC = lax.scan(step, (), x_nCD)
    return id_nC


def _logits(x_CD: Array, head_DV: Array, cap: float) -> Array:
    """Returns the logits of a chunk, in a wide dtype and under the cap."""
    with jax.named_scope("head"):
        return soft_cap(_product(x_CD, head_DV, 1, 0), cap)


def _product(a: Array, b: Array, dim_a: int, dim_b: int) -> Array:
    """Contracts dimension `dim_a` of a with `dim_b` of b, and adds up in a wide dtype."""
    dims = ((dim_a,), (dim_b,)), ((), ())
    return lax.dot_general(a, b, dims, preferred_element_type=wide_dtype(a.dtype))
