"""The product of the gradient of a weight, against numpy and in the compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.parallel.outer import outer

# One matrix and several, an even and an odd number of rows.
SHAPES = [((6, 3), (6, 4)), ((5, 3), (5, 4)), ((2, 6, 3), (2, 6, 4)), ((2, 5, 3), (2, 5, 4))]


@pytest.mark.parametrize(("of_a", "of_b"), SHAPES)
def test_it_is_the_sum_over_rows(of_a, of_b):
    random = np.random.default_rng(0)
    a = random.normal(size=of_a).astype("float32")
    b = random.normal(size=of_b).astype("float32")
    wanted = np.einsum("...rx,...ry->...xy", a, b)
    np.testing.assert_allclose(outer(a, b, "float32"), wanted, rtol=1e-5, atol=1e-6)


def test_it_adds_up_in_the_wider_type():
    a = jnp.ones((1024, 1), "bfloat16")
    # In bfloat16 a sum of ones ends at 256.
    assert outer(a, a, jnp.float32) == 1024


@pytest.mark.parametrize("common", [(), (8,)])
def test_a_cpu_takes_its_fast_product(common):
    """XLA calls it a fusion for YNNPACK, and has no product left beside it."""
    a, b = jnp.ones((*common, 256, 64)), jnp.ones((*common, 256, 32))
    text = jax.jit(lambda a, b: outer(a, b, "float32")).lower(a, b).compile().as_text()
    assert "__ynn_fusion" in text
    calls = re.findall(r"= \S+ dot\(", text.split("ENTRY")[1])
    assert not calls
