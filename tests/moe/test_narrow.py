"""Products of narrow numbers against the whole products, within the bound that they state, and
against the same arithmetic written in numpy.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import meshes
import ml_dtypes
import numpy as np
import pytest

from moe_jax.models.layers import FeedForward
from moe_jax.moe.experts import narrow
from moe_jax.moe.experts.grouped_matmul import KERNELS, expert_ffn
from moe_jax.moe.experts.network import Chosen
from moe_jax.parallel import compiling

pytestmark = pytest.mark.usefixtures("float64")
KINDS = tuple(narrow.KINDS)
ROWS, D, F, E = 24, 10, 6, 3
# Rows of three experts, with a gap before the last and one without rows between.
START, SIZE = np.array([0, 8, 16]), np.array([7, 0, 6])


def rounded(array, axis, kind):
    """An array as it is after rounding, in float64, by numpy."""
    most = {"int8": 127.0, "float8": 448.0}[kind]
    scale = np.max(np.abs(array), axis=axis, keepdims=True) / most
    scale = np.where(scale == 0, 1, scale)
    scaled = array / scale
    if kind == "int8":
        return np.rint(scaled) * scale
    return scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def draw(*shape, seed=0):
    """Numbers of very different sizes, some of them zero."""
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=shape) * np.exp(2 * rng.normal(size=shape))
    return np.where(rng.random(shape) < 0.1, 0.0, numbers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("platform", ["cpu", "others"])
def test_a_product_is_that_of_rounded_factors(kind, platform):
    a, w = draw(5, 64), draw(64, 7, seed=1)
    a[2] = 0

    def product(a, w):
        return narrow.times(a, narrow.rounded(w, 0, kind), a.dtype)

    with compiling.of_other_platforms() if platform == "others" else jax.disable_jit(False):
        got = np.asarray(jax.jit(product)(a, w))
    want = rounded(a, 1, kind) @ rounded(w, 0, kind)
    # On other platforms float8 is added up in float32.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    assert not got[2].any()
    off = np.abs(got - a @ w)
    bound = np.asarray(narrow.error(jnp.asarray(a), jnp.asarray(w), kind))
    assert (off <= bound + 1e-5 * np.abs(want).max()).all()
    # The bound is of use: it is no more than a few percent of the sum of sizes.
    assert (bound <= 0.2 * np.abs(a) @ np.abs(w) + 0.02 * bound.max()).mean() > 0.5
    assert off.max() > 1e-4 * np.abs(want).max()


def experts(seed=0):
    """(x, gate, w_in, w_out, dy) of the layout above."""
    parts = draw(ROWS, D, seed=seed), draw(ROWS, seed=seed + 1)
    weights = draw(E, D, 1, F, seed=seed + 2), draw(E, F, D, seed=seed + 3)
    return (*parts, *weights, draw(ROWS, D, seed=seed + 4))


def gelu(x):
    """(GELU by its tanh formula, its derivative)."""
    c, d = np.sqrt(2 / np.pi), 0.044715
    t = np.tanh(c * (x + d * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * c * (1 + 3 * d * x**2)
    return 0.5 * x * (1 + t), slope


def oracle(x, gate, w_in, w_out, dy, kind):
    """(y, dx, dgate, dw_in, dw_out) of a GELU network, straight through the rounding."""
    y, dx, dgate = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gate)
    dw_in, dw_out = np.zeros_like(w_in), np.zeros_like(w_out)
    for i in range(E):
        rows = slice(START[i], START[i] + SIZE[i])
        if not SIZE[i]:
            continue
        w1, w2 = w_in[i, :, 0], w_out[i]
        pre = rounded(x[rows], 1, kind) @ rounded(w1, 0, kind)
        h, slope = gelu(pre)
        gated = h * gate[rows, None]
        y[rows] = rounded(gated, 1, kind) @ rounded(w2, 0, kind)
        dgated = dy[rows] @ w2.T
        dgate[rows] = (dgated * h).sum(1)
        dpre = dgated * gate[rows, None] * slope
        dx[rows] = dpre @ w1.T
        dw_in[i, :, 0], dw_out[i] = x[rows].T @ dpre, gated.T @ dy[rows]
    return y, dx, dgate, dw_in, dw_out


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(kernel, kind, x, gate, w_in, w_out, dy):
    def run(x, gate, w_in, w_out):
        layout = jnp.asarray(START, jnp.int32), jnp.asarray(SIZE, jnp.int32)
        return expert_ffn(
            *(x, gate, *layout, w_in, w_out),
            activation="gelu",
            block=(8, 4),
            kernel=kernel,
            numbers=kind,
        )

    y, pull = jax.vjp(run, x, gate, w_in, w_out)
    return y, *pull(dy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["blocks", "tiles", "ragged_dot", "interpreted"])
def test_every_kernel_of_the_experts_rounds_alike(kernel, kind, interpreted_kernel):
    arguments = experts()
    got = value_and_gradients(kernel, kind, *arguments)
    want = oracle(*arguments, kind)
    for name, a, b in zip(("y", "x", "gate", "w_in", "w_out"), got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5 * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_feed_forward_rounds_on_every_mesh_alike(kind):
    """Also where the hidden columns are split over `model`."""
    x, dy = draw(4, 6, 8, seed=5), draw(4, 6, 8, seed=6)

    def run(*lengths):
        with jax.set_mesh(meshes.make(*lengths)):
            module = FeedForward(
                jax.random.key(0), 8, 12, Chosen("gelu"), 0.3, "float64", numbers=kind
            )
            place = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(("data", "expert")))
            put = [jax.device_put(z, place) for z in (x, dy)]
            y, pull = jax.vjp(module.__call__, put[0])
            weights = [np.asarray(module.weights[name]) for name in ("w_in", "w_out")]
            return np.asarray(y), np.asarray(pull(put[1])[0]), weights

    y, dx, (w_in, w_out) = run(1, 1, 1)
    flat, w1 = x.reshape(-1, 8), w_in[:, 0]
    pre = rounded(flat, 1, kind) @ rounded(w1, 0, kind)
    h, slope = gelu(pre)
    want = rounded(h, 1, kind) @ rounded(w_out, 0, kind)
    np.testing.assert_allclose(y.reshape(-1, 8), want, atol=1e-5 * np.abs(want).max())
    dpre = dy.reshape(-1, 8) @ w_out.T * slope
    np.testing.assert_allclose(dx.reshape(-1, 8), dpre @ w1.T, atol=1e-10 * np.abs(dx).max())
    for lengths in ((2, 1, 2), (1, 1, 4)):
        np.testing.assert_allclose(run(*lengths)[0], y, atol=1e-12 * np.abs(y).max())


def test_the_key_and_the_record_name_the_same_numbers():
    from moe_jax.schema.config import FFN_NUMBERS, ModelConfig

    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    assert fields["ffn_numbers"].default == narrow.FULL == FFN_NUMBERS[0]
    assert FFN_NUMBERS[1:] == KINDS


@pytest.fixture
def interpreted_kernel(monkeypatch):
    """The kernel of TPUs, as a CPU interprets it."""
    from moe_jax.moe.experts import grouped_matmul, pallas_tpu

    products = functools.partial(pallas_tpu.products, interpret=True)
    monkeypatch.setitem(KERNELS, "interpreted", grouped_matmul._of_products(products))
