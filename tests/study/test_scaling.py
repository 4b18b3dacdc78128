"""Scaling laws: known coefficients are found again, and what a ladder cannot tell is said."""

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.study import scaling
from moe_jax.study.scaling import Point

CLARK = {"a": -0.08, "b": -0.10, "c": 0.004, "d": 1.7}
KRAJEWSKI = {"c": 0.5, "a": 20.0, "alpha": 0.3, "g": 8.0, "gamma": 0.6, "b": 40.0, "beta": 0.4}
SIZES = (1e5, 3e5, 1e6, 3e6, 1e7)


def ladder(law, values, noise, *, d=(1e6,), e=(1.0,), g=(1.0,), sizes=SIZES, seeds=3):
    rng = np.random.default_rng(1)
    bare = [Point(n, x, y, z, 0.0) for n in sizes for x in d for y in e for z in g]
    bare = [point for point in bare for _ in range(seeds)]
    losses = scaling.LAWS[law].predict(values, bare) + noise * rng.normal(size=len(bare))
    return [point._replace(loss=float(loss)) for point, loss in zip(bare, losses, strict=True)]


def test_clark_finds_what_made_the_runs():
    found = scaling.fit("clark", ladder("clark", CLARK, 0.002, e=(1.0, 4.0, 16.0, 64.0)))
    for name, value in CLARK.items():
        assert found.low[name] < value < found.high[name], name
    assert found.coefficients["a"] == pytest.approx(CLARK["a"], rel=0.05)
    assert not any(sentence.startswith(("a ", "b ", "d ")) for sentence in found.unknown)


def test_krajewski_finds_what_made_the_runs():
    points = ladder("krajewski", KRAJEWSKI, 1e-5, d=(1e5, 1e6, 1e7), g=(1.0, 2.0, 8.0), seeds=1)
    found = scaling.fit("krajewski", points)
    for name in ("c", "alpha", "beta", "gamma"):
        assert found.coefficients[name] == pytest.approx(KRAJEWSKI[name], rel=0.03), name
    assert not found.unknown


def test_a_ladder_says_what_it_cannot_tell():
    one_number = scaling.fit("clark", ladder("clark", CLARK, 0.002, e=(8.0,)))
    assert "b cannot be told: the number of experts is the same in all runs" in one_number.unknown
    assert "b" not in one_number.coefficients
    noisy = scaling.fit("clark", ladder("clark", CLARK, 0.3, e=(1.0, 2.0), sizes=SIZES[:2]))
    assert any(sentence.startswith("c may be 0") for sentence in noisy.unknown)
    tokens = scaling.fit("krajewski", ladder("krajewski", KRAJEWSKI, 1e-4))
    assert set(tokens.coefficients) == {"c", "a", "alpha"}


def test_the_largest_models_are_predicted_from_the_others():
    points = ladder("clark", CLARK, 0.002, e=(1.0, 8.0, 64.0))
    found = scaling.leave_largest_out("clark", points)
    assert found.holds and found.size == SIZES[-1]
    assert found.low < found.measured < found.high
    # A law that bends at the last size is seen: its losses are higher than the others foretell.
    bent = [p._replace(loss=p.loss + 0.2 * (p.n == SIZES[-1])) for p in points]
    assert not scaling.leave_largest_out("clark", bent).holds


def test_too_few_runs_are_refused():
    with pytest.raises(UserError, match="2 runs are too few for the 4 coefficients of clark"):
        scaling.fit("clark", [Point(1e5, 1e6, 1, 1, 2.0), Point(1e6, 1e6, 8, 1, 1.9)])
    with pytest.raises(UserError, match="no law is called"):
        scaling.fit("chinchilla", [])
