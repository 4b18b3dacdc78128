"""After each update, what is below a magnitude is zero; it may come back (the article, section
3.3).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moe_jax.moe.sparse.patterns.contract import Matrices, Pattern, Shaped, largest
from moe_jax.moe.sparse.rules.contract import Kept, Now, Rule
from moe_jax.schema.options import NOT_NEGATIVE, option


@dataclasses.dataclass(frozen=True)
class Options:
    threshold: float = option(
        0.0,
        "the magnitude; 0 = that which leaves the pattern's density of each expert's first values",
        NOT_NEGATIVE,
    )


def first_thresholds(experts: Matrices, shape: Shaped, options: Options) -> Kept:
    """Nothing for a given threshold; else, for every expert, the magnitude that leaves the
    pattern's density of its first values [E].
    """
    if options.threshold:
        return {}
    scores = shape.norms(experts)

    def least(z: jax.Array) -> jax.Array:
        number = math.prod(z.shape[1:])
        chosen = largest(z, shape.pattern.count(shape.options, number), 1)
        return jnp.where(chosen, z, jnp.inf).min(tuple(range(1, z.ndim)))

    return {key: least(z) for key, z in scores.items()}


def below_to_zero(
    experts: Matrices, kept: Kept, shape: Shaped, now: Now, options: Options
) -> Matrices:
    """W[|W| < threshold] = 0.

    An entry comes back when a single update moves it by at least the threshold.
    """
    scores = shape.norms(experts)

    def threshold(key, z):
        return options.threshold or kept[key].reshape(-1, *[1] * (z.ndim - 1))

    alive = shape.spread({key: z >= threshold(key, z) for key, z in scores.items()}, experts)
    return {name: jnp.where(alive[name], x, jnp.zeros_like(x)) for name, x in experts.items()}


def unfit(pattern: Pattern) -> str:
    """A fixed number of entries heeds no magnitude."""
    if pattern.fixed:
        return "exactly n of every m are kept, whatever their magnitude: set the rule to static"
    return ""


RULE = Rule(Options, first_thresholds, project=below_to_zero, unfit=unfit)
