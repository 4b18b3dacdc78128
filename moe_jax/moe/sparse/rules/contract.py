"""What a rule is: which entries of the experts are zero, from the first step to the last.

A rule either keeps masks (`update` makes new ones; entries outside stay exactly zero, and so do
their moments), or acts on the weights after every update of the optimizer (`project`; what it makes
zero may come back). All work on the experts of one layer, {name: [E, I, ..., O]}, with a pattern
that says what is zero together; a group's magnitude is the root mean square of its entries.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe.sparse.patterns.contract import Matrices, Pattern, Shaped

# What a rule keeps from step to step: masks by matrix, or thresholds by key of groups.
Kept = dict[str, jax.Array]


class Now(NamedTuple):
    """Holds the moment of an update."""

    # Updates done, this one included.
    step: jax.Array
    # Those of the whole training.
    steps: int
    # The learning rate of this update.
    rate: jax.Array
    # The randomness of this update; in `update` that of the layer's part of it.
    key: jax.Array


def fits_all(pattern: Pattern) -> str:
    """Says that a rule goes with any pattern."""
    del pattern
    return ""


def no_refusals(options: Any, pattern: Pattern, at: str) -> Iterator[str]:
    """Refuses nothing."""
    del options, pattern, at
    yield from ()


class Rule(NamedTuple):
    """Holds all that there is to know of a rule; `RULE` of its file."""

    # The frozen dataclass of its block in the config.
    options: type
    # (matrices, shape, options) -> what it keeps, from the first values.
    first: Callable[[Matrices, Shaped, Any], Kept]
    # (now, options) -> do masks change now?
    due: Callable[[Now, Any], jax.Array] | None = None
    # (weights, masks, dense gradients, shape, now, options) -> masks.
    update: Callable[[Matrices, Kept, Matrices, Shaped, Now, Any], Kept] | None = None
    # (weights, kept, shape, now, options) -> weights after the optimizer's update.
    project: Callable[[Matrices, Kept, Shaped, Now, Any], Matrices] | None = None
    # Why it does not go with a pattern; "" = it does.
    unfit: Callable[[Pattern], str] = fits_all
    # Yields what is wrong with its options; `at` is the path of its block.
    refusals: Callable[[Any, Pattern, str], Iterator[str]] = no_refusals

    @property
    def moves(self) -> bool:
        """Returns whether it changes experts after an update, so that none can be frozen."""
        return self.update is not None or self.project is not None


def first_masks(experts: Matrices, shape: Shaped, options: Any) -> Kept:
    """Returns the entries of the largest groups of the first values.

    With options.threshold > 0 those of the groups of at least that magnitude: W = random; W[|W| <
    threshold] = 0, and later only non-zero entries move (the article, section 3.1 and 3.2).
    """
    norms = shape.norms(experts)
    # Only the rule `static` has this option; the others go by density.
    if getattr(options, "threshold", 0):
        chosen = {key: z >= options.threshold for key, z in norms.items()}
    else:
        chosen = shape.choose(norms, shape.kept)
    return shape.spread(chosen, experts)


def all_masks(experts: Matrices, shape: Shaped, options: Any) -> Kept:
    """Returns masks that keep everything."""
    del shape, options
    return {name: jnp.ones_like(x, dtype=bool) for name, x in experts.items()}


def span(now: Now, begin: float, end: float) -> tuple[int, int]:
    """Returns the first and the last step of changes, from fractions of the training."""
    # The end is at least 1: RigL divides by it.
    return round(begin * now.steps), max(1, round(end * now.steps))
