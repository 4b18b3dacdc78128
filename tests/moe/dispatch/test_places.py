"""The places of an expert in each group: how many there are, and which of them are computed."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.moe.dispatch import capacity
from moe_jax.moe.dispatch.contract import Experts
from moe_jax.moe.dispatch.layout import Shape
from moe_jax.moe.routing.contract import Routing

# Two groups of 8 tokens with one choice each, four experts: a factor of 1 gives two places.
SHAPE = Shape(
    num_experts=4,
    num_tokens=16,
    num_assignments=16,
    num_intended=16,
    per_token=1,
    group_tokens=8,
    expert_axis=1,
)


def test_places_are_those_that_are_told():
    found = [
        capacity.expert_capacity(SHAPE, capacity.Options(factor=1.0, places=places))
        for places in (0, 1, 3, 8, 2**31 - 1)
    ]
    # No more than there are tokens.
    assert found == [2, 1, 3, 8, 8]


def test_places_that_nothing_fills_are_not_computed():
    """The filled rows of an expert come first, whichever group they are of."""
    nowhere = SHAPE.num_experts
    expert_index_N = jnp.array([0, 0, 0, 1, 1, 2, 2, 2, 0, 3, 3, 3, 3, 1, nowhere, 0])
    # The third of an expert in its group finds no room.
    is_dropped_N = np.array([0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0], bool)
    x_TD = 1 + jnp.arange(16.0)[:, None]
    gate_N = jnp.ones(16)
    told = []

    def grouped(x_RD, gate_R, start_e, size_e, block):
        told.append(size_e)
        filled_R = jnp.zeros(x_RD.shape[0], bool)
        for start, size in zip(start_e, size_e, strict=True):
            row_R = jnp.arange(x_RD.shape[0])
            filled_R |= (row_R >= start) & (row_R < start + size)
        # Rows of nobody may hold anything, and give zero.
        return jnp.where(filled_R[:, None], 10 * x_RD * gate_R[:, None], 0)

    def apply(x_TD):
        routing = Routing(jnp.arange(16), expert_index_N, gate_N, {}, per_token=1)
        options = capacity.Options(factor=1.0)
        y_TD, dropped_N = capacity.apply(
            x_TD, routing, Experts(grouped), shape=SHAPE, options=options
        )
        return y_TD, dropped_N, told[-1]

    # The axis has one device.
    y_TD, dropped_N, size_e = jax.vmap(apply, axis_name="expert")(x_TD[None])
    np.testing.assert_array_equal(size_e[0], [4, 3, 2, 2])
    np.testing.assert_array_equal(dropped_N[0], is_dropped_N)
    has_none = is_dropped_N | (np.asarray(expert_index_N) == nowhere)
    np.testing.assert_array_equal(y_TD[0, :, 0], np.where(has_none, 0, 10 * x_TD[:, 0]))


def test_a_factor_beside_places_is_told():
    at = "model.moe.dispatchers.capacity"
    (said,) = capacity.advice(capacity.Options(factor=2.0, places=3), at, 1)
    assert said.startswith(f"{at}.factor = 2.0 does nothing, because {at}.places = 3")
    for options in (capacity.Options(places=3), capacity.Options(factor=2.0)):
        assert not list(capacity.advice(options, at, 1))
