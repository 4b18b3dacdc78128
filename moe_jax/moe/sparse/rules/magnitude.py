"""The smallest go, from dense to the pattern's density (Zhu & Gupta 2017, arXiv:1710.01878)."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe_jax.moe.sparse.patterns.contract import Matrices, Pattern, Shaped
from moe_jax.moe.sparse.rules.contract import Kept, Now, Rule, all_masks, span
from moe_jax.schema.options import FRACTION, NUMBER, option


@dataclasses.dataclass(frozen=True)
class Options:
    begin: float = option(0.0, "as a fraction of train.steps", FRACTION)
    end: float = option(0.5, "likewise: from here on the masks stay", FRACTION)
    every: int = option(20, "steps between changes of the masks", NUMBER)


def cubic_density(now: Now, options: Options, final: float) -> jax.Array:
    """Returns the density 1 - s_f + s_f (1 - (t - t_0) / (t_1 - t_0))^3; final = 1 - s_f.

    It is equation 1 of the paper, from sparsity 0.
    """
    begin, end = span(now, options.begin, options.end)
    progress = jnp.clip((now.step - begin) / max(end - begin, 1), 0.0, 1.0)
    return final + (1 - final) * (1 - progress) ** 3


def due(now: Now, options: Options) -> jax.Array:
    """Returns whether masks change at this step: every so many, and at the end."""
    begin, end = span(now, options.begin, options.end)
    is_inside = (now.step >= begin) & (now.step <= end)
    # At the end in any case, so that the last density is the pattern's whatever `every` is.
    return is_inside & ((now.step % options.every == 0) | (now.step == end))


def update(
    experts: Matrices, masks: Kept, grads: Matrices, shape: Shaped, now: Now, options: Options
) -> Kept:
    """Returns the masks of the largest groups; what is pruned is zero, so it stays pruned."""

    def count(groups: jax.Array) -> jax.Array:
        row_size, num_kept = shape.row_size(groups), shape.kept(groups)
        density = cubic_density(now, options, num_kept / row_size)
        num_alive = jnp.round(density * row_size).astype(jnp.int32)
        # Never fewer than the pattern keeps in the end.
        return jnp.maximum(num_alive, num_kept)

    chosen = shape.choose(shape.norms(experts), count)
    return shape.spread(chosen, experts)


def refusals(options: Options, pattern: Pattern, at: str) -> Iterator[str]:
    """Refuses a pruning that ends before it begins."""
    del pattern
    if options.begin > options.end:
        yield f"{at}.begin ({options.begin}) must not exceed {at}.end ({options.end})"


RULE = Rule(Options, all_masks, due, update, refusals=refusals)
