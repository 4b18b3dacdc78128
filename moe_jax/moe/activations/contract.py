"""What an activation is.

Shapes: F hidden, P parts of the first weight (2: gate and up, 1 otherwise).
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array


class Activation(NamedTuple):
    """Holds all that there is to know of an activation; `ACTIVATION` of its file."""

    # The frozen dataclass of its block in the config.
    options: type
    # P.
    parts: int
    # (options, P arrays [..., F]) -> hidden [..., F].
    of: Callable[..., Array]
    # The same function by other operations, for proofs: it shares no code with `of`.
    reference: Callable[..., Array]
    # The same as `of`, with a gradient that keeps less, for the large arrays of a dense
    # feed-forward; None = `of`.
    lean: Callable[..., Array] | None = None
