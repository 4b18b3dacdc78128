"""Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1); the decay of AdamW is added by `make`."""

import dataclasses
from typing import Any

import optax

from moe_jax.optim.optimizers.contract import Optimizer
from moe_jax.schema.options import BELOW_ONE, NOT_NEGATIVE, option


@dataclasses.dataclass(frozen=True)
class Options:
    b1: float = option(0.9, "decay of the first moment", BELOW_ONE)
    b2: float = option(0.95, "decay of the second moment", BELOW_ONE)
    eps: float = option(1e-08, "added to the root of the second moment", NOT_NEGATIVE)
    weight_decay: float = option(0.1, "decoupled, times the learning rate", NOT_NEGATIVE)


def direction(leaves: Any, options: Options) -> optax.GradientTransformation:
    """Returns the direction of an update."""
    del leaves
    return optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.eps)


OPTIMIZER = Optimizer(Options, direction, squares=("nu",))
