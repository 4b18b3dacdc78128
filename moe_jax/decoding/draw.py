"""The next token of each row, drawn from its logits, and the settings of the draw.

Shapes: B rows, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.errors import UserError


class Settings(NamedTuple):
    """Holds what a caller of the sampler chooses."""

    # Per prompt.
    max_tokens: int
    # 0 = greedy: always the likeliest token.
    temperature: float
    # Draw from the k likeliest tokens; 0 = all.
    top_k: int
    # Of these, from the fewest whose probability reaches p; 1 = all.
    top_p: float
    seed: int
    # Text that ends a row, and is not part of it.
    stop: tuple[str, ...]


class Dials(NamedTuple):
    """Settings that the device loop reads, as arguments: another value compiles nothing anew."""

    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any


def check(settings: Settings) -> None:
    """Raises UserError for settings that mean nothing."""
    rules = {
        "max_tokens": (settings.max_tokens >= 1, "at least 1"),
        "temperature": (0 <= settings.temperature < math.inf, "at least 0 (0 is greedy)"),
        "top_k": (settings.top_k >= 0, "at least 0 (0 is off)"),
        "top_p": (0 < settings.top_p <= 1, "above 0 and at most 1 (1 is off)"),
        "seed": (0 <= settings.seed < 2**32, "at least 0 and below 2**32"),
    }
    for name, (fits, rule) in rules.items():
        if not fits:
            raise UserError(f"{name} = {getattr(settings, name)} must be {rule}")
    if "" in settings.stop:
        raise UserError("stop = '' is in every text: give a stop string that is not empty")


def dials(settings: Settings) -> Dials:
    """Returns the settings that the device loop reads, as it reads them."""
    return Dials(
        temperature=np.float32(settings.temperature),
        # More than there are tokens in any vocabulary, and it fits into an int32.
        top_k=np.int32(min(settings.top_k, 2**31 - 1)),
        top_p=np.float32(settings.top_p),
        seed=np.uint32(settings.seed),
    )


def draw(logits_BV: Array, row_B: Array, count_B: Array, dials: Dials) -> Array:
    """Returns the next token of each row, int32 [B].

    The key is (seed, row, tokens drawn), so no row changes another's text.
    """

    def greedy(_) -> Array:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)

    def sampled(key: Array) -> Array:
        def noise(row, count):
            drawn = jax.random.fold_in(jax.random.fold_in(key, row), count)
            return jax.random.gumbel(drawn, logits_BV.shape[1:], logits_BV.dtype)

        # The largest of logits with Gumbel noise is a draw from their softmax.
        noise_BV = jax.vmap(noise)(row_B, count_B)
        temperature = jnp.maximum(dials.temperature, 1e-6).astype(logits_BV.dtype)
        # The likeliest is 0 then, so no small temperature makes an infinity of it.
        scaled_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature
        some = (dials.top_k > 0) | (dials.top_p < 1)

        def keep(x_BV):
            return keep_likely(x_BV, dials.top_k, dials.top_p)

        # The vocabulary is sorted only where something is to be cut off.
        kept_BV = jax.lax.cond(some, keep, lambda x_BV: x_BV, scaled_BV)
        return jnp.argmax(kept_BV + noise_BV, -1).astype(jnp.int32)

    return jax.lax.cond(dials.temperature > 0, sampled, greedy, jax.random.key(dials.seed))


def keep_likely(logits_BV: Array, top_k: Array, top_p: Array) -> Array:
    """Returns the logits of the tokens that may be drawn, -inf for the others.

    First the `top_k` likeliest (Fan et al. 2018, arXiv:1805.04833), then, of their renormalised
    distribution, the fewest that reach `top_p` together (Holtzman et al. 2020, arXiv:1904.09751),
    at least one. Tokens that tie with the last one kept are kept too.
    """
    # The likeliest first.
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    rank_1V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)[None]
    likely_1V = (top_k == 0) | (rank_1V < top_k)
    probs_BV = jax.nn.softmax(jnp.where(likely_1V, sorted_BV, -jnp.inf))
    # What the likelier tokens have together.
    before_BV = jnp.cumsum(probs_BV, -1) - probs_BV
    nucleus_BV = (before_BV < top_p.astype(before_BV.dtype)) | (rank_1V == 0) | (top_p >= 1)
    # inf marks what is not kept, so the minimum is the logit of the last one kept.
    kept_BV = jnp.where(likely_1V & nucleus_BV, sorted_BV, jnp.inf)
    last_B1 = kept_BV.min(-1, keepdims=True)
    return jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)
