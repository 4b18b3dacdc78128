"""Lion (arXiv:2302.06675): the sign of momentum mixed with the gradient.

Wants about a tenth of AdamW's rate.
"""

import dataclasses
from typing import Any

import optax

from moe_jax.optim.optimizers.contract import Optimizer
from moe_jax.schema.options import BELOW_ONE, NOT_NEGATIVE, option


@dataclasses.dataclass(frozen=True)
class Options:
    b1: float = option(0.9, "share of the momentum in the update", BELOW_ONE)
    b2: float = option(0.99, "decay of the momentum", BELOW_ONE)
    weight_decay: float = option(0.1, "decoupled, times the learning rate", NOT_NEGATIVE)


def direction(leaves: Any, options: Options) -> optax.GradientTransformation:
    """Returns the direction of an update."""
    del leaves
    return optax.scale_by_lion(b1=options.b1, b2=options.b2)


OPTIMIZER = Optimizer(Options, direction)
