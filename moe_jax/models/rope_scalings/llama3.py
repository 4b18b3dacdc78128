"""The scaling of Llama 3.1 (Grattafiori et al. 2024, arXiv:2407.21783, section 3.4.2; the rule
itself is that of the released code): long wavelengths are interpolated, short ones are not.

With r = original_length / wavelength, the turns of a pair over a row of the first training:

    r < low_freq_factor         frequency / factor
    r > high_freq_factor        frequency
    between                     s frequency + (1 - s) frequency / factor,
                                s = (r - low_freq_factor) / (high_freq_factor - low_freq_factor)
"""

import dataclasses
import math
from collections.abc import Iterator

import jax.numpy as jnp
from jax import Array

from moe_jax.models.rope_scalings.contract import RopeScaling
from moe_jax.schema.options import FROM_ONE, NUMBER, POSITIVE, option


@dataclasses.dataclass(frozen=True)
class Options:
    factor: float = option(8.0, "rows are so many times as long as before", FROM_ONE)
    low_freq_factor: float = option(1.0, "pairs with fewer turns are interpolated", POSITIVE)
    high_freq_factor: float = option(4.0, "pairs with more turns are left alone", POSITIVE)
    original_length: int = option(8192, "tokens of a row of the first training", NUMBER)


def frequencies(frequency_P: Array, theta: float, options: Options) -> Array:
    """Returns the frequencies by the number of turns over a row of the first training."""
    del theta
    low, high = options.low_freq_factor, options.high_freq_factor
    turns_P = options.original_length * frequency_P / (2 * math.pi)
    # 0 where a pair is interpolated, 1 where it is left alone.
    kept_P = jnp.clip((turns_P - low) / (high - low), 0, 1)
    return kept_P * frequency_P + (1 - kept_P) * frequency_P / options.factor


def refusals(options: Options, at: str, theta: float) -> Iterator[str]:
    """Refuses bounds in the wrong order."""
    del theta
    if options.low_freq_factor >= options.high_freq_factor:
        yield (
            f"{at}.low_freq_factor ({options.low_freq_factor}) must be below "
            f"{at}.high_freq_factor ({options.high_freq_factor})"
        )


ROPE_SCALING = RopeScaling(Options, frequencies, refusals=refusals)
