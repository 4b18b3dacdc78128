"""The gradient g, or its running sum m = momentum * m + g (nesterov: momentum * m + g)."""

import dataclasses
from typing import Any

import optax

from moe_jax.optim.optimizers.contract import Optimizer
from moe_jax.schema.options import BELOW_ONE, NOT_NEGATIVE, option


@dataclasses.dataclass(frozen=True)
class Options:
    momentum: float = option(0.9, "decay of the running sum; 0 = the gradient itself", BELOW_ONE)
    nesterov: bool = option(False, "look one step ahead")
    weight_decay: float = option(0.0, "decoupled, times the learning rate", NOT_NEGATIVE)


def direction(leaves: Any, options: Options) -> optax.GradientTransformation:
    """Returns the direction of an update."""
    del leaves
    return optax.trace(options.momentum, options.nesterov) if options.momentum else optax.identity()


OPTIMIZER = Optimizer(Options, direction)
