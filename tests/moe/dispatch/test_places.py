"""A number of places of an expert in each group, whatever the factor is."""

from moe_jax.moe.dispatch import capacity
from moe_jax.moe.dispatch.layout import Shape


def test_places_are_those_that_are_told():
    """Two groups of 8 tokens with one choice each, four experts: a factor of 1 gives two places."""
    shape = Shape(
        num_experts=4,
        num_tokens=16,
        num_assignments=16,
        num_intended=16,
        per_token=1,
        group_tokens=8,
        expert_axis=1,
    )
    found = [
        capacity.expert_capacity(shape, capacity.Options(factor=1.0, places=places))
        for places in (0, 1, 3, 8, 2**31 - 1)
    ]
    # No more than there are tokens.
    assert found == [2, 1, 3, 8, 8]


def test_a_factor_beside_places_is_told():
    at = "model.moe.dispatchers.capacity"
    (said,) = capacity.advice(capacity.Options(factor=2.0, places=3), at, 1)
    assert said.startswith(f"{at}.factor = 2.0 does nothing, because {at}.places = 3")
    for options in (capacity.Options(places=3), capacity.Options(factor=2.0)):
        assert not list(capacity.advice(options, at, 1))
