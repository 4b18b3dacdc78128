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
    """Returns the magnitude [E] that leaves the pattern's density of each expert's first values.

    It keeps nothing where the option gives the threshold.
    """
    if options.threshold:
        return {}

    def least_kept(norms: jax.Array) -> jax.Array:
        number = math.prod(norms.shape[1:])
        num_kept = shape.pattern.count(shape.options, number)
        # One row for each expert: the threshold is that of all its groups together.
        is_kept = largest(norms, num_kept, 1)
        all_but_experts = tuple(range(1, norms.ndim))
        # The smallest norm among those that are kept.
        return jnp.where(is_kept, norms, jnp.inf).min(all_but_experts)

    return {key: least_kept(norms) for key, norms in shape.norms(experts).items()}


def below_to_zero(
    experts: Matrices, kept: Kept, shape: Shaped, now: Now, options: Options
) -> Matrices:
    """Returns the weights after W[|W| < threshold] = 0.

    An entry comes back when a single update moves it by at least the threshold.
    """
    del now

    def is_alive(key: str, norms: jax.Array) -> jax.Array:
        if options.threshold:
            return norms >= options.threshold
        threshold_E = kept[key]
        # [E] beside groups of any number of dimensions.
        return norms >= threshold_E.reshape(-1, *[1] * (norms.ndim - 1))

    alive_groups = {key: is_alive(key, norms) for key, norms in shape.norms(experts).items()}
    alive = shape.spread(alive_groups, experts)
    return {name: jnp.where(alive[name], x, jnp.zeros_like(x)) for name, x in experts.items()}


def unfit(pattern: Pattern) -> str:
    """Says why it does not go with a pattern: a fixed number heeds no magnitude."""
    if pattern.fixed:
        return "exactly n of every m are kept, whatever their magnitude: set the rule to static"
    return ""


RULE = Rule(Options, first_thresholds, project=below_to_zero, unfit=unfit)
