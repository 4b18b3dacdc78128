"""What a rotary scaling is: how the frequencies of rotary embeddings change for rows that are
longer than those of the first training.

Unscaled, pair i of a head of width A turns by theta^(-2 i / A) radians a token (Su et al. 2021,
arXiv:2104.09864). Its wavelength is 2 pi over that.

Shapes: A head width, P = A / 2 pairs.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jax import Array


def no_refusals(options: Any, at: str, theta: float) -> Iterator[str]:
    """Refuses nothing."""
    del options, at, theta
    yield from ()


def one(options: Any) -> float:
    """Returns 1: cosines and sines stay as they are."""
    del options
    return 1.0


class RopeScaling(NamedTuple):
    """Holds all that there is to know of a rotary scaling; `ROPE_SCALING` of its file."""

    # The frozen dataclass of its block in the config.
    options: type
    # (unscaled frequencies [P], theta, options) -> the frequencies [P], radians a token.
    frequencies: Callable[[Array, float, Any], Array]
    # options -> the factor on cosines and sines; its square is that on the scores.
    magnitude: Callable[[Any], float] = one
    # (options, path of its block, theta) -> what is wrong with them.
    refusals: Callable[[Any, str, float], Iterator[str]] = no_refusals
