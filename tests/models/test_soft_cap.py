"""Soft caps: values by hand, and a gradient that is read off the result."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from moe_jax.models.soft_cap import lean_soft_cap, pulled_back, soft_cap


def test_values_by_hand(float64):
    """2 tanh(x / 2): 2 tanh(1 / 2) = 0.92423431; nearly x where x is small, never beyond 2."""
    x = jnp.asarray([0.0, 1.0, -1.0, 1e-4, 100.0, -1e6])
    got = soft_cap(x, 2.0)
    np.testing.assert_allclose(got, [0, 0.924234315, -0.924234315, 1e-4, 2, -2], rtol=1e-8)
    assert soft_cap(x, 0.0) is x and pulled_back(x, x, 0.0) is x


def test_the_gradient_is_that_of_autodiff(float64):
    x, dy = np.random.default_rng(0).normal(size=(2, 3, 50)) * 4
    _, pull = jax.vjp(lambda x: soft_cap(x, 3.0), x)
    y, lean = jax.vjp(lambda x: lean_soft_cap(x, 3.0), x)
    np.testing.assert_allclose(lean(dy)[0], pull(dy)[0], atol=1e-14)
    np.testing.assert_allclose(pulled_back(dy, y, 3.0), pull(dy)[0], atol=1e-14)


def test_the_logits_of_a_model_are_those_without_a_cap_under_it(float64):
    id_BS = np.random.default_rng(0).integers(0, 64, (2, 6)).astype(np.int32)
    plain, capped = (
        tiny.first_logits({"model.repeats": 1, "model.logit_cap": cap}, id_BS) for cap in (0.0, 0.1)
    )
    # First logits have a standard deviation of 0.1: many are beyond the cap.
    assert np.abs(plain).max() > 0.2
    np.testing.assert_allclose(capped, 0.1 * np.tanh(plain / 0.1), atol=1e-14)
