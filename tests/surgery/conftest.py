"""All in float64, where equality can be proven."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def in_float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
