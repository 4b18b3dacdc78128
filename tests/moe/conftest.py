"""Strict promotion for every test of the room: a program that uses the layer may have set it."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    """Refuses every mix of dtypes and of ranks that the code does not write out."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def standard_promotion(strict_promotion):
    """Allows mixes of dtypes to a test that trains a whole model: optax and other rooms mix."""
    with jax.numpy_dtype_promotion("standard"):
        yield
