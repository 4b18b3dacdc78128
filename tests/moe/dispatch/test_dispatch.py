"""Both dispatchers against the NumPy oracle in float64, forward and gradient, on every mesh of
eight devices, under hostile routings (tests/dispatch_cases.py).
"""

import meshes
import pytest
from dispatch_cases import FACTOR, B, S, check

from moe_jax.moe.dispatch import DISPATCHERS, capacity, dropless
from moe_jax.moe.dispatch.layout import Shape
from moe_jax.moe.experts import direct

VARIANTS = {
    "dropless": ("dropless", dropless.Options(buffer=0.0)),
    "rounds": ("dropless", dropless.Options(buffer=1.0)),
    "direct": ("dropless", dropless.Options(direct=True)),
    "capacity": ("capacity", capacity.Options(factor=FACTOR)),
}


@pytest.fixture(autouse=True)
def any_number_is_few(monkeypatch):
    """Then "direct" is what it says on every mesh."""
    monkeypatch.setattr(direct, "MOST_TOKENS", B * S)


@pytest.mark.parametrize("shape", meshes.ALL, ids=meshes.name)
def test_equals_the_oracle_on_every_mesh(float64, shape):
    check(VARIANTS, shape)


@pytest.mark.parametrize(
    ("shape", "num_experts", "k", "parts"),
    [
        # More choices than experts on a device.
        ((1, 2, 1), 6, 5, 1),
        # Fewer assignments than experts: "direct" takes one after another.
        ((4, 2, 1), 32, 1, 2),
        # More experts than the expert axis is long; GELU.
        pytest.param((2, 2, 2), 16, 2, 1, marks=pytest.mark.full),
        # One expert.
        pytest.param((4, 1, 2), 1, 1, 2, marks=pytest.mark.full),
        # Every expert for every token.
        pytest.param((2, 4, 1), 4, 4, 2, marks=pytest.mark.full),
    ],
)
def test_equals_the_oracle_for_other_numbers_of_experts(float64, shape, num_experts, k, parts):
    check(VARIANTS, shape, num_experts, k, parts)


def test_rows_are_bounded_by_the_worst_case():
    """n T min(k, e) rows and the padding of each expert's room, by hand: n = 4, T = 32, e = 2, k =
    2: 256 rows and 2 rooms.
    """
    shape = Shape(
        8, 32, num_assignments=64, num_intended=64, per_token=2, group_tokens=4, expert_axis=4
    )
    rows = DISPATCHERS["dropless"].rows(shape, dropless.Options(buffer=0.0))
    assert 256 <= rows <= 256 + 2 * 32
    assert DISPATCHERS["dropless"].rows(shape, dropless.Options(buffer=1.0)) < rows
    # capacity 1.0: C = 1.0 * 2 * 4 / 8 = 1 place of each of 8 experts in each of 8 groups
    assert DISPATCHERS["capacity"].rows(shape, capacity.Options(factor=1.0)) == 64
    # factor 2.0 of a router that lists two experts per token and means one: the same place
    assert (
        DISPATCHERS["capacity"].rows(shape._replace(num_intended=32), capacity.Options(factor=2.0))
        == 64
    )
