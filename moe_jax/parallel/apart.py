"""A computation that XLA's CPU compiler keeps apart from what reads its results.

A fusion computes what it reads anew, for each number that it makes. That may copy a whole array
for one number of it, or take cosines of the same angles many times. Barriers do not help: the
compiler takes them away first. A loop is never part of a fusion, and one whose length is not known
stays a loop.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.parallel.compiling import platform

T = TypeVar("T")


def apart(function: Callable[[T], T], given: T, number: Array) -> T:
    """Returns function(given), computed in a loop of its own on a CPU.

    Args:
      number: any integer, a scalar that the compiler does not know. The loop runs once whatever it
        is.
    """
    if platform() != "cpu":
        return function(given)
    # True of every integer, which the compiler does not see.
    once = ((number | 1) != 0).astype(jnp.int32)
    return jax.lax.fori_loop(0, once, lambda _, x: function(x), given)
