"""RigL: the smallest go, those with the largest dense gradient come (Evci et al. 2020,
arXiv:1911.11134).
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.sparse.patterns.contract import Matrices, Pattern, Shaped
from moe_jax.moe.sparse.rules.contract import Kept, Now, Rule, first_masks, span
from moe_jax.moe.sparse.rules.regrowth import regrow, regrowth_due
from moe_jax.schema.options import FRACTION, NUMBER, option


@dataclasses.dataclass(frozen=True)
class Options:
    fraction: float = option(0.3, "at first; it falls to 0 as a cosine", FRACTION)
    every: int = option(50, "steps between changes of the masks", NUMBER)
    end: float = option(0.75, "as a fraction of train.steps", FRACTION)


def fraction(now: Now, options: Options) -> jax.Array:
    """Returns alpha / 2 (1 + cos(pi t / T_end)) (section 3, "update schedule")."""
    _, end = span(now, 0.0, options.end)
    progress = jnp.clip(now.step / end, 0.0, 1.0)
    return options.fraction / 2 * (1 + jnp.cos(jnp.pi * progress))


def update(
    experts: Matrices, masks: Kept, grads: Matrices, shape: Shaped, now: Now, options: Options
) -> Kept:
    """Returns the masks after the groups with the largest dense gradient have come."""
    # The gradients are dense: an entry that is masked has one too.
    growth = shape.norms(grads)
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
        return "a unit that is all zero has no gradient to be chosen by: set the rule to magnitude"
    return ""


RULE = Rule(Options, first_masks, regrowth_due, update, unfit=unfit)
