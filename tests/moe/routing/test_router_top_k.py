"""The top-k router: hand-worked cases, the oracle's gradient, padding, ties, and the load figures
made of its sums.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moe_jax.moe import load
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import RouterCfg, Tokens


def route(x_TD, gate_DE, valid_T=None, num_rows=1, **options):
    num = len(x_TD)
    zero = jnp.zeros(num, jnp.int32)
    valid_T = jnp.ones(num, bool) if valid_T is None else jnp.asarray(valid_T)
    tokens = Tokens(jnp.asarray(x_TD), zero, zero, zero, zero, valid_T, num_rows)
    cfg = RouterCfg(
        gate_DE.shape[1],
        ROUTERS["top_k"].options(**options),
        group_rows=1,
        vocab_size=8,
        total=lambda z: z,
    )
    args = ({"gate": jnp.asarray(gate_DE)}, {}, tokens)
    return ROUTERS["top_k"].route(*args, cfg=cfg, rng=jax.random.key(0), train=True)


def test_hand_worked_gates(float64):
    """Logits (log 4, log 3, log 2, log 1) have probabilities .4 .3 .2 .1: the two largest are
    experts 0 and 1.
    """
    x, gate = np.eye(1), np.log([[4.0, 3.0, 2.0, 1.0]])
    assert route(x, gate).expert_index_N.tolist() == [0, 1]
    np.testing.assert_allclose(route(x, gate).gate_N, [4 / 7, 3 / 7])
    np.testing.assert_allclose(route(x, gate, renormalize=False).gate_N, [0.4, 0.3])
    np.testing.assert_allclose(route(x, gate, softmax="after").gate_N, [4 / 7, 3 / 7])
    np.testing.assert_allclose(route(x, gate, scale=2.5).gate_N, [10 / 7, 7.5 / 7])


def test_ties_go_to_the_lower_index(float64):
    assert route(np.ones((3, 2)), np.zeros((2, 5)), k=3).expert_index_N.tolist() == [0, 1, 2] * 3


@pytest.mark.parametrize("renormalize", [True, False])
def test_gates_and_their_gradient_equal_the_oracle(float64, renormalize):
    rng = np.random.default_rng(0)
    x, gate, weight = rng.normal(size=(12, 5)), rng.normal(size=(5, 8)), rng.normal(size=(12, 3))
    options = {"k": 3, "renormalize": renormalize, "scale": 1.7}
    chosen, gates, _ = oracle.top_k(x, gate, **options)
    got = route(x, gate, **options)
    assert got.expert_index_N.tolist() == chosen.reshape(-1).tolist()
    np.testing.assert_allclose(got.gate_N, gates.reshape(-1), atol=1e-12)

    def loss(x, gate):
        return (route(x, gate, **options).gate_N * weight.reshape(-1)).sum()

    dx, dgate = jax.grad(loss, argnums=(0, 1))(x, gate)
    want_dx, want_dgate = oracle.top_k_backward(x, gate, 3, weight, renormalize, 1.7)
    np.testing.assert_allclose(dx, want_dx, atol=1e-12)
    np.testing.assert_allclose(dgate, want_dgate, atol=1e-12)


def test_padding_goes_nowhere_and_counts_nowhere(float64):
    rng = np.random.default_rng(0)
    x, gate = rng.normal(size=(8, 4)), rng.normal(size=(4, 6))
    valid = np.array([1, 1, 1, 0, 1, 0, 0, 0], bool)
    got, alone = route(x, gate, valid, num_rows=2), route(x[valid], gate)
    assert (got.expert_index_N.reshape(8, 2)[~valid] == 6).all()
    for name, value in alone.sums.items():
        np.testing.assert_allclose(got.sums[name].sum(0), value.sum(0), atol=1e-12, err_msg=name)
    changed = route(np.where(valid[:, None], x, 1e3), gate, valid, num_rows=2)
    for name, value in got.sums.items():
        np.testing.assert_array_equal(changed.sums[name], value, err_msg=name)


def test_selection_in_bfloat16_is_that_of_float32():
    rng = np.random.default_rng(0)
    x, gate = (
        jnp.asarray(rng.normal(size=(256, 16)), jnp.bfloat16),
        jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
    )
    assert (
        route(x, gate).expert_index_N == route(x.astype(jnp.float32), gate).expert_index_N
    ).all()


def test_load_figures_by_hand(float64):
    """Counts (4, 0, 2, 2): mean 2, so max/mean = 2; one expert of four is dead; 1 of 8 assignments
    dropped.
    """
    totals = {
        "counts": jnp.array([[4.0, 0.0, 2.0, 2.0]]),
        "tokens": jnp.array([4.0]),
        "dropped": jnp.array([1.0]),
    }
    totals |= {name: jnp.array([4.0]) for name in ("z", "entropy", "gate", "gate_max")}
    got = load.metrics(totals)
    assert (got["load_max"][0], got["dead_experts"][0], got["drop_fraction"][0]) == (
        2.0,
        1.0,
        0.125,
    )
    np.testing.assert_allclose(
        got["load_entropy"][0], (0.5 * np.log(2) + 2 * 0.25 * np.log(4)) / np.log(4)
    )
