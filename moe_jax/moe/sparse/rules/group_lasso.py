"""Group lasso: hidden units become zero by the proximal step of their norms' sum (Scardapane et al.
2017, arXiv:1607.00485).
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.sparse.patterns.contract import Matrices, Pattern, Shaped
from moe_jax.moe.sparse.rules.contract import Kept, Now, Rule
from moe_jax.schema.options import NOT_NEGATIVE, option


@dataclasses.dataclass(frozen=True)
class Options:
    strength: float = option(
        0.2, "lambda, beside the root mean square of a unit's weights", NOT_NEGATIVE
    )


def keeps_nothing(experts: Matrices, shape: Shaped, options: Options) -> Kept:
    """Returns no masks: zeros come by themselves."""
    del experts, shape, options
    return {}


def shrink_units(
    experts: Matrices, kept: Kept, shape: Shaped, now: Now, options: Options
) -> Matrices:
    """w <- max(0, 1 - rate * lambda * sqrt(n) / |w|) w for every unit w of n entries: the proximal
    step of lambda sqrt(n) |w|.

    The step size is the learning rate, also under optimizers that scale every entry's update on its
    own: then lambda means what it does for weight decay there (decoupled), and the zeros are as
    exact.
    """

    def factor(rms: jax.Array) -> jax.Array:  # |w| / sqrt(n) is the root mean square
        cut = now.rate * options.strength
        return jnp.where(rms > cut, 1 - cut / jnp.where(rms > cut, rms, 1), 0)

    factors = {key: factor(z) for key, z in shape.norms(experts).items()}
    spread = shape.spread(factors, experts)

    def scale(x, factor):
        return jnp.where(factor > 0, x * factor.astype(x.dtype), jnp.zeros_like(x))  # 0, not -0

    return {name: scale(x, spread[name]) for name, x in experts.items()}


def unfit(pattern: Pattern) -> str:
    """The groups of the penalty are hidden units."""
    if pattern.of_units:
        return ""
    return "the penalty is that of whole hidden units: set the pattern to units"


RULE = Rule(Options, keeps_nothing, project=shrink_units, unfit=unfit)
