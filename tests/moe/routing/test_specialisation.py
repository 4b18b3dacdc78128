"""Training finds the right experts where there are right experts: tests/maps.py has the task, its
floors, and the table of all routers.
"""

import maps
import pytest
from suites import normal

from moe_jax.moe.routing import ROUTERS

pytestmark = pytest.mark.usefixtures("standard_promotion")  # whole models are trained

# What a router must reach: 0 is what no dense network of equal active size surpasses, 1 the right
# assignment.
BLIND = ("uniform", "random", "hash")  # read nothing of the cluster
MIXING = (
    "soft",
)  # an expert sees mixtures of tokens, and cannot tell one token's z from another's
ORACLE = ("recorded",)  # replays the right assignment
LEARNED = [name for name in ROUTERS if name not in BLIND + MIXING + ORACLE]
NORMAL = ("top_k", "relu", "expert_choice", "base")


def trained(router):
    loss = maps.train_moe(maps.config(router))
    print(f"{router}: loss {loss:.4f}, score {maps.score(loss):.2f}")
    return maps.score(loss)


def test_no_dense_network_of_equal_active_size_passes_the_floor():
    """The floor is a bound, and training comes within 2 % of it, so the bound is what a dense
    network can do.
    """
    assert maps.floor(8) == pytest.approx((maps.D - 8) / (maps.C * maps.D))
    assert -0.02 < maps.score(maps.train_dense(maps.ACTIVE * maps.HIDDEN)) <= 1e-3


@pytest.mark.parametrize("router", normal(NORMAL, LEARNED))
def test_learned_routers_specialise(router):
    assert trained(router) > 0.5


@pytest.mark.parametrize("router", normal(NORMAL, BLIND + MIXING))
def test_routers_that_cannot_see_the_cluster_do_not(router):
    assert trained(router) < 0.25


def test_the_right_assignment_reaches_the_optimum():
    assert trained("recorded") > 0.99
