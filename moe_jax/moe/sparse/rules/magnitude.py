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
    """1 - s_f + s_f (1 - (t - t_0) / (t_1 - t_0))^3, final = 1 - s_f (equation 1 of the paper, from
    sparsity 0).
    """
    begin, end = span(now, options.begin, options.end)
    t = jnp.clip((now.step - begin) / max(end - begin, 1), 0.0, 1.0)
    return final + (1 - final) * (1 - t) ** 3


def due(now: Now, options: Options) -> jax.Array:
    begin, end = span(now, options.begin, options.end)
    return (
        (now.step >= begin)
        & (now.step <= end)
        & ((now.step % options.every == 0) | (now.step == end))
    )


def update(
    experts: Matrices, masks: Kept, grads: Matrices, shape: Shaped, now: Now, options: Options
) -> Kept:
    """What is pruned is zero, so it is the smallest and stays pruned."""

    def count(groups: jax.Array) -> jax.Array:
        number, kept = shape.row_size(groups), shape.kept(groups)
        density = cubic_density(now, options, kept / number)
        return jnp.maximum(jnp.round(density * number).astype(jnp.int32), kept)

    return shape.spread(shape.choose(shape.norms(experts), count), experts)


def refusals(options: Options, pattern: Pattern, at: str) -> Iterator[str]:
    """Pruning ends after it begins."""
    del pattern
    if options.begin > options.end:
        yield f"{at}.begin ({options.begin}) must not exceed {at}.end ({options.end})"


RULE = Rule(Options, all_masks, due, update, refusals=refusals)
