"""Position interpolation: every position is divided by a factor (Chen et al. 2023,
arXiv:2306.15595, eq. 4).
"""

import dataclasses

from jax import Array

from moe_jax.models.rope_scalings.contract import RopeScaling
from moe_jax.schema.options import FROM_ONE, option


@dataclasses.dataclass(frozen=True)
class Options:
    factor: float = option(1.0, "rows are so many times as long as before", FROM_ONE)


def frequencies(frequency_P: Array, theta: float, options: Options) -> Array:
    """Returns slower frequencies: a position that is divided, as one factor on all of them."""
    del theta
    return frequency_P / options.factor


ROPE_SCALING = RopeScaling(Options, frequencies)
