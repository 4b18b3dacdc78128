"""The product of the gradient of a weight, against numpy and in the compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.attention_core import attention, causal, windowed
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


def slow_products(f, *args):
    """Returns the products of a compiled program that XLA has not given to YNNPACK."""
    text = jax.jit(f).lower(*args).compile().as_text()
    fast = set(re.findall(r"calls=%([\w.\-]+)[^\n]*__ynn_fusion", text))
    assert fast
    found = []
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        name = re.match(r"(?:ENTRY )?%([\w.\-]+)", computation)
        if name and name.group(1) not in fast:
            found += re.findall(r"= (\S+) dot\(", computation)
    return found


@pytest.mark.parametrize("common", [(), (8,)])
def test_a_cpu_takes_its_fast_product(common):
    a, b = jnp.ones((*common, 256, 64)), jnp.ones((*common, 256, 32))
    assert not slow_products(lambda a, b: outer(a, b, "float32"), a, b)


@pytest.mark.parametrize("seen", [causal, lambda segment: windowed(segment, 128)])
@pytest.mark.parametrize("length", [250, 256])
def test_attention_takes_fast_products_alone(seen, length):
    """Also of a window, and where a row is no multiple of its blocks."""
    q = jnp.ones((1, length, 8, 32))
    segment = jnp.ones((1, length), jnp.int32)

    def loss(q, k, v):
        return (attention(q, k, v, seen(segment), scale=0.1) ** 2).sum()

    assert not slow_products(jax.grad(loss, (0, 1, 2)), q, q, q)
