"""YaRN: long wavelengths are interpolated, short ones are not, and scores are sharpened (Peng et
al. 2023, arXiv:2309.00071).

    d(r) = A log(original_length / (2 pi r)) / (2 log theta)       the pair that turns r times over
                                                                   a row of the first training
    kept_i = 1 - clip((i - d(beta_fast)) / (d(beta_slow) - d(beta_fast)), 0, 1)
    frequency_i (kept_i + (1 - kept_i) / factor)                   section 3.2, eq. 17-20
    cos and sin times 0.1 log(factor) + 1                          section 3.4, eq. 22

As in the authors' code the ramp runs over the numbers of pairs, whose bounds are rounded outwards
(`truncate`), and not over the turns themselves.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax.numpy as jnp
from jax import Array

from moe_jax.models.rope_scalings.contract import RopeScaling
from moe_jax.schema.options import FROM_ONE, NOT_NEGATIVE, NUMBER, POSITIVE, option

# Of a ramp that begins where it ends.
NARROWEST = 1e-3


@dataclasses.dataclass(frozen=True)
class Options:
    factor: float = option(4.0, "rows are so many times as long as before", FROM_ONE)
    original_length: int = option(4096, "tokens of a row of the first training", NUMBER)
    beta_fast: float = option(32.0, "pairs with more turns are left alone", POSITIVE)
    beta_slow: float = option(1.0, "pairs with fewer turns are interpolated", POSITIVE)
    magnitude: float = option(
        0.0, "factor on cosines and sines; 0 = 0.1 log(factor) + 1", NOT_NEGATIVE
    )
    truncate: bool = option(True, "the ramp begins and ends at whole pairs")


def frequencies(frequency_P: Array, theta: float, options: Options) -> Array:
    """Returns the frequencies, interpolated by a ramp over the pairs."""
    num_pairs = len(frequency_P)

    def pair_of(turns: float) -> float:
        ratio = options.original_length / (2 * math.pi * turns)
        return num_pairs * math.log(ratio) / math.log(theta)

    first, last = pair_of(options.beta_fast), pair_of(options.beta_slow)
    if options.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The bound above is that of the authors' code: the width of a head, not the number of pairs.
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    if first == last:
        last += NARROWEST
    pair_P = jnp.arange(num_pairs, dtype=frequency_P.dtype)
    interpolated_P = jnp.clip((pair_P - first) / (last - first), 0, 1)
    return frequency_P * (1 - interpolated_P) + frequency_P / options.factor * interpolated_P


def magnitude(options: Options) -> float:
    """Returns the factor on cosines and sines."""
    return options.magnitude or 0.1 * math.log(options.factor) + 1


def refusals(options: Options, at: str, theta: float) -> Iterator[str]:
    """Refuses bounds in the wrong order, and a base without long wavelengths."""
    if options.beta_slow >= options.beta_fast:
        yield (
            f"{at}.beta_slow ({options.beta_slow}) must be below {at}.beta_fast "
            f"({options.beta_fast})"
        )
    if theta <= 1:
        yield (
            f"model.rope_theta ({theta}) must be above 1 for model.rope_scaling=yarn, which tells "
            "pairs apart by their wavelengths"
        )


ROPE_SCALING = RopeScaling(Options, frequencies, magnitude, refusals)
