"""Gradients that are written out against those of autodiff, on one device and on a mesh."""

import re

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest

from moe_jax.models.layers import linear, rope, rotate
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.precision import wide_dtype

B, S, D, F = 4, 6, 8, 16


# The dimensions of x behind rows and tokens, those that w adds, and what stands for both in an
# einsum: a feed-forward, the projection to heads and that back. The first of them is split.
HEADS, WIDTH = 4, 3
LINEAR = {
    "feed_forward": ((D,), (F,), "d,df->f", (None, "model")),
    "to_heads": ((D,), (HEADS, WIDTH), "d,dha->ha", (None, "model", None)),
    "from_heads": ((HEADS, WIDTH), (D,), "ha,had->d", ("model", None, None)),
}


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("kind", LINEAR)
def test_linear_is_a_product(float64, kind, shape, dtype):
    read, written, letters, w_spec = LINEAR[kind]
    of_x, of_w, of_y = letters.replace("->", ",").split(",")
    random = np.random.default_rng(0)
    shapes = ((B, S, *read), (*read, *written), (B, S, *written))
    values = [random.normal(size=size) for size in shapes]
    wide = wide_dtype(dtype)
    mesh = meshes.make(*shape)
    x_spec, y_spec = P(BATCH, None, *w_spec[: len(read)]), P(BATCH, None, *w_spec[len(read) :])

    def own(x, w, weight):
        return (linear(x, w, wide, y_spec) * weight).sum()

    with jax.set_mesh(mesh):
        x, w, weight = (
            jax.device_put(value, jax.NamedSharding(mesh, spec))
            for value, spec in zip(values, (x_spec, P(*w_spec), y_spec), strict=True)
        )
        x, w, weight = x.astype(dtype), w.astype(dtype), weight.astype(wide)
        got = jax.jit(jax.value_and_grad(own, (0, 1)))(x, w, weight)
    (total, (dx, dw)) = jax.tree.map(np.asarray, got)
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    accuracy = 1e-12 if dtype == "float64" else 1e-2
    y = np.einsum(f"bs{of_x},{of_w}->bs{of_y}", x, w)
    np.testing.assert_allclose(total, (y * values[2]).sum(), rtol=accuracy)
    wanted = (
        np.einsum(f"bs{of_y},{of_w}->bs{of_x}", values[2], w),
        np.einsum(f"bs{of_x},bs{of_y}->{of_w}", x, values[2]),
    )
    for mine, plain in zip((dx, dw), wanted, strict=True):
        np.testing.assert_allclose(mine, plain, rtol=accuracy, atol=accuracy * abs(plain).max())


@pytest.mark.parametrize("kind", LINEAR)
def test_no_gradient_of_a_weight_is_transposed(kind):
    """It is x^T @ dy, in the order of the weight; that of autodiff is dy^T @ x."""
    read, written, _, _ = LINEAR[kind]
    x, w = jnp.ones((B, S, *read)), jnp.ones((*read, *written))
    gradient = jax.grad(lambda x, w: linear(x, w, jnp.float32).sum(), (0, 1))
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(gradient)(x, w).eqns]
    assert "dot_general" in names and "transpose" not in names


def test_narrow_factors_have_narrow_products():
    """Logits in float32 have no products of float32 behind them where the factors are narrow."""
    x, w = jnp.ones((B, S, D), "bfloat16"), jnp.ones((D, F), "bfloat16")
    gradient = jax.grad(lambda x, w: linear(x, w, jnp.float32).sum(), (0, 1))
    products = [
        eqn for eqn in jax.make_jaxpr(gradient)(x, w).eqns if eqn.primitive.name == "dot_general"
    ]
    assert len(products) == 2
    assert all(factor.aval.dtype == "bfloat16" for eqn in products for factor in eqn.invars)


def test_the_gradient_of_a_rotation_turns_back(float64):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(B, S, 2, D)))
    dy = jnp.asarray(random.normal(size=x.shape))
    position = jnp.asarray(random.integers(0, 50, (B, S)), jnp.int32)
    cos, sin = rope(position, D, 10_000.0, "float64", lambda frequency: frequency)

    def plain(x):
        first, second = jnp.split(x, 2, axis=-1)
        return x * cos + jnp.concatenate([-second, first], axis=-1) * sin

    y, pull = jax.vjp(plain, x)
    mine, own_pull = jax.vjp(lambda x: rotate(x, cos, sin), x)
    np.testing.assert_array_equal(mine, y)
    np.testing.assert_allclose(own_pull(dy)[0], pull(dy)[0], rtol=1e-14)


@pytest.mark.parametrize("first", [0, -1])
def test_angles_are_computed_once_and_are_those_of_the_formula(first):
    """A CPU fuses cosines into each use otherwise, and takes them for every head."""
    position_BS = jnp.arange(first, first + 512, dtype=jnp.int32)[None]

    def cos_and_sin(position_BS):
        return rope(position_BS, 8, 10_000.0, "float32", lambda frequency: frequency)

    def pulled(x_BSHA, position_BS):
        turned, pull = jax.vjp(lambda x: rotate(x, *cos_and_sin(position_BS)), x_BSHA)
        return turned, pull(turned)

    x_BSHA = jax.random.normal(jax.random.key(0), (1, 512, 4, 8))
    hlo = jax.jit(pulled).lower(x_BSHA, position_BS).compile().as_text()
    assert len(re.findall(r" cosine\(", hlo)) == 1
    angle_SA = np.arange(first, first + 512.0)[:, None] * np.tile(
        10_000.0 ** (-np.arange(4.0) / 4), 2
    )
    cos, sin = jax.jit(cos_and_sin)(position_BS)
    np.testing.assert_allclose(cos[0, :, 0], np.cos(angle_SA), atol=1e-4)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(angle_SA), atol=1e-4)
