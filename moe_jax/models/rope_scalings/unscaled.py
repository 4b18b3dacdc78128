"""Rotary frequencies as they are (Su et al. 2021, arXiv:2104.09864)."""

import dataclasses

from jax import Array

from moe_jax.models.rope_scalings.contract import RopeScaling


@dataclasses.dataclass(frozen=True)
class Options:
    """There are none."""


def frequencies(frequency_P: Array, theta: float, options: Options) -> Array:
    """Returns what is given."""
    del theta, options
    return frequency_P


ROPE_SCALING = RopeScaling(Options, frequencies)
