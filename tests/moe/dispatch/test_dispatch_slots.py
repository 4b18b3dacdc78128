"""The slots dispatcher against a dense soft MoE in float64, forward and gradient, on meshes with
and without an expert axis.
"""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from router_cases import compiled

from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.dispatch.contract import Experts
from moe_jax.moe.dispatch.layout import Shape
from moe_jax.moe.experts.grouped_matmul import expert_ffn
from moe_jax.moe.routing.contract import Slots
from moe_jax.parallel.mesh import BATCH, P, spec

B, S, D, F, E, SLOTS, GROUP_ROWS = 16, 4, 16, 16, 8, 3, 2
G = B // GROUP_ROWS


def dense(x_BSD, dispatch, combine, w_in, w_out):
    """The paper's three lines: mixtures of each group's tokens, every expert on its slots, mixtures
    of their results.
    """
    x_GtD = x_BSD.reshape(G, GROUP_ROWS * S, D)
    slot_GEpD = jnp.einsum("gtep,gtd->gepd", dispatch, x_GtD)
    gate, up = jnp.moveaxis(jnp.einsum("gepd,edcf->gepcf", slot_GEpD, w_in), 3, 0)
    y_GEpD = jnp.einsum("gepf,efd->gepd", jax.nn.sigmoid(gate) * gate * up, w_out)
    return jnp.einsum("gtep,gepd->gtd", combine, y_GEpD).reshape(x_BSD.shape)


def layer(x, dispatch, combine, w_in, w_out):
    def on_device(x, dispatch, combine, w_in, w_out):
        w_in = jax.lax.all_gather(w_in, "data", axis=1, tiled=True)
        w_out = jax.lax.all_gather(w_out, "data", axis=2, tiled=True)
        num, groups = x.shape[0] * S, len(dispatch)
        shape = Shape(
            E,
            num,
            groups * E * SLOTS,
            groups * E * SLOTS,
            0,
            GROUP_ROWS * S,
            jax.lax.axis_size("expert"),
        )

        def grouped(x, g, start, size, block):
            return expert_ffn(x, g, start, size, w_in, w_out, activation="swiglu", block=block)

        slots = Slots(dispatch, combine, {})
        y, dropped = DISPATCHERS["slots"].apply(
            x.reshape(num, D),
            slots,
            Experts(grouped),
            shape=shape,
            options=DISPATCHERS["slots"].options(),
        )
        assert dropped.shape == (0,)
        return jax.lax.psum(y, ("model", "seq")).reshape(x.shape)

    row, weights = (
        P(BATCH),
        (
            spec("experts", "expert_embed", None, "hidden"),
            spec("experts", "hidden", "expert_embed"),
        ),
    )
    return jax.shard_map(on_device, in_specs=(row, row, row, *weights), out_specs=row)(
        x, dispatch, combine, w_in, w_out
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 8, 1)], ids=meshes.name)
def test_equals_a_dense_soft_moe(float64, shape):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, B, S, D))
    dispatch, combine = rng.random((2, G, GROUP_ROWS * S, E, SLOTS))
    dispatch[1] = combine[1] = 0  # a group of padding
    w_in, w_out = rng.normal(size=(E, D, 2, F)) / 4, rng.normal(size=(E, F, D)) / 4
    arguments = (x, dispatch, combine, w_in, w_out)
    names = [("batch",)] * 3 + [
        ("experts", "expert_embed", None, "hidden"),
        ("experts", "hidden", "expert_embed"),
    ]

    def both(function):
        def loss(arguments, dy):
            y = function(*arguments)
            return (y * dy).sum(), y

        return compiled(jax.grad(loss, has_aux=True))

    want = both(dense)(arguments, dy)
    with jax.set_mesh(meshes.make(*shape)):
        placed = tuple(meshes.put(z, *name) for z, name in zip(arguments, names, strict=True))
        got = jax.device_get(both(layer)(placed, meshes.put(dy, "batch")))
    for name, have, right in zip(
        ("x", "dispatch", "combine", "w_in", "w_out", "y"),
        (*got[0], got[1]),
        (*want[0], want[1]),
        strict=True,
    ):
        assert np.abs(have - right).max() < 1e-10, (
            f"{name} deviates by {np.abs(have - right).max()}"
        )


def test_rows_are_the_slots():
    """2 groups of 8 tokens, 4 experts of 3 slots: 24 rows on every device."""
    shape = Shape(
        num_experts=4,
        num_tokens=16,
        num_assignments=24,
        num_intended=24,
        per_token=0,
        group_tokens=8,
        expert_axis=2,
    )
    assert DISPATCHERS["slots"].rows(shape, {}) == 24
