"""Adafactor (arXiv:1804.04235) without momentum; the mean square is factored over the two
largest dims >= 128.

The update is clipped to a root mean square of 1 and scaled by that of the parameter, so the
learning rate is *relative* (about 1e-2). Statistics are per array: the experts of a layer are
one array, the layers of a stack not.
"""

import dataclasses
from typing import Any

import optax

from moe_jax.optim.optimizers.contract import Optimizer, leaf_by_leaf
from moe_jax.schema.options import NOT_NEGATIVE, PART, option


@dataclasses.dataclass(frozen=True)
class Options:
    decay_rate: float = option(0.8, "exponent of the decay of the mean square", PART)
    weight_decay: float = option(0.0, "decoupled, times the learning rate", NOT_NEGATIVE)


def direction(leaves: Any, options: Options) -> optax.GradientTransformation:
    """Returns the direction of an update."""
    # Leaf by leaf, for each layer of a stack is to have statistics of its own.
    rms = optax.scale_by_factored_rms(decay_rate=options.decay_rate)
    return leaf_by_leaf(
        optax.chain(rms, optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()), leaves
    )


OPTIMIZER = Optimizer(Options, direction, squares=("v", "v_row", "v_col"))
