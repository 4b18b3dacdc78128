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
    """Returns max(0, 1 - rate * lambda * sqrt(n) / |w|) w for every unit w of n entries.

    It is the proximal step of lambda sqrt(n) |w|.

    The step size is the learning rate, also under optimizers that scale every entry's update on its
    own: then lambda means what it does for weight decay there (decoupled), and the zeros are as
    exact.
    """

    # The norm of a group is its root mean square, |w| / sqrt(n).
    norms = shape.norms(experts)
    cut = now.rate * options.strength

    def factor(rms: jax.Array) -> jax.Array:
        is_alive = rms > cut
        # Nothing is divided by a norm of 0.
        divisor = jnp.where(is_alive, rms, 1)
        return jnp.where(is_alive, 1 - cut / divisor, 0)

    factors = shape.spread({key: factor(rms) for key, rms in norms.items()}, experts)

    def scale(x: jax.Array, factor: jax.Array) -> jax.Array:
        # A product with 0 could be -0.
        return jnp.where(factor > 0, x * factor.astype(x.dtype), jnp.zeros_like(x))

    return {name: scale(x, factors[name]) for name, x in experts.items()}


def unfit(pattern: Pattern) -> str:
    """Says why it does not go with a pattern: its groups must be hidden units."""
    if pattern.of_units:
        return ""
    return "the penalty is that of whole hidden units: set the pattern to units"


RULE = Rule(Options, keeps_nothing, project=shrink_units, unfit=unfit)
