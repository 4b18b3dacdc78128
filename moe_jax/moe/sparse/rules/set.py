"""SET: the smallest go, random ones come (Mocanu et al. 2018, arXiv:1707.04780)."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.sparse.patterns.contract import Matrices, Pattern, Shaped
from moe_jax.moe.sparse.rules.contract import Kept, Now, Rule, first_masks
from moe_jax.moe.sparse.rules.regrowth import regrow, regrowth_due
from moe_jax.schema.options import FRACTION, NUMBER, option


@dataclasses.dataclass(frozen=True)
class Options:
    fraction: float = option(0.3, "of the living, replaced at each change", FRACTION)
    every: int = option(50, "steps between changes of the masks", NUMBER)
    end: float = option(0.75, "as a fraction of train.steps", FRACTION)


def fraction(now: Now, options: Options) -> jax.Array:
    """Returns the share of the living that is replaced: the same at every change."""
    del now
    return jnp.asarray(options.fraction, jnp.float32)


def update(
    experts: Matrices, masks: Kept, grads: Matrices, shape: Shaped, now: Now, options: Options
) -> Kept:
    """Returns the masks after random groups have come."""
    del grads
    # In the order of names, whatever that of the dict is: a restart must draw the same.
    scores = shape.norms(experts)
    names = sorted(scores)
    keys = jax.random.split(now.key, len(names))
    growth = {}
    for name, key in zip(names, keys, strict=True):
        growth[name] = jax.random.uniform(key, scores[name].shape)
    return regrow(experts, masks, growth, shape, fraction(now, options))


def unfit(pattern: Pattern) -> str:
    """Says why it does not go with a pattern.

    Few weights cannot be replaced by a fraction, and a dead unit gets no gradient.
    """
    if pattern.fixed:
        return (
            "a fraction of n weights is none of them or half of them: set the rule to static or "
            "magnitude"
        )
    if pattern.of_units:
        return (
            "a unit that is all zero has no gradient, so one that came would stay zero: set the "
            "rule to "
            "magnitude"
        )
    return ""


RULE = Rule(Options, first_masks, regrowth_due, update, unfit=unfit)
