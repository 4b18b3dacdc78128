"""Strict promotion for every test of the room: a narrow number that is widened by accident costs
memory, a wide one that is narrowed costs digits.
"""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    """Refuses every mix of dtypes that the code does not write out."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def standard_promotion(strict_promotion):
    """Allows mixes of dtypes to a test that trains: optax mixes."""
    with jax.numpy_dtype_promotion("standard"):
        yield
