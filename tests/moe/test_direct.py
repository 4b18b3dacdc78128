"""The experts on few tokens, each of the ways against one that is written plainly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.experts import direct
from moe_jax.moe.experts.network import Chosen

T, E, K, D, F = 32, 8, 2, 3, 4
# Places of an expert: twice its share, by hand.
C = 16


def weights():
    rng = np.random.default_rng(0)
    shapes = ((T, D), (T * K,), (E, D, 2, F), (E, F, D))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def plain(expert_M):
    """y_TD in NumPy, an assignment at a time."""
    x_TD, gate_M, w_in, w_out = weights()
    y_TD = np.zeros((T, D))
    for m, (i, gate) in enumerate(zip(expert_M, gate_M, strict=True)):
        if i < E:
            pre_PF = np.einsum("d,dpf->pf", x_TD[m // K].astype(np.float64), w_in[i])
            hidden_F = pre_PF[0] / (1 + np.exp(-pre_PF[0])) * pre_PF[1]
            y_TD[m // K] += gate * hidden_F @ w_out[i]
    return y_TD


def loads(first):
    """An expert for each assignment: `first` of them take expert 0, the others in turn."""
    expert_M = 1 + np.arange(T * K) % (E - 1)
    # Not the first ones, and two of one token are in it.
    expert_M[np.random.default_rng(1).permutation(T * K)[:first]] = 0
    return expert_M.astype(np.int32)


def run(expert_M, x_TD=None, ffn=direct.direct_ffn):
    own_TD, gate_M, w_in, w_out = weights()
    x_TD = own_TD if x_TD is None else x_TD
    token_M = jnp.repeat(jnp.arange(T, dtype=jnp.int32), K)
    return ffn(x_TD, token_M, jnp.asarray(expert_M), gate_M, w_in, w_out, chosen=Chosen("swiglu"))


JITTED = functools.partial(run, ffn=jax.jit(direct.direct_ffn, static_argnames="chosen"))


@pytest.mark.parametrize("first", [0, 1, C - 1, C, C + 1, T * K])
def test_any_load_equals_the_plain_one(first):
    expert_M = loads(first)
    np.testing.assert_allclose(JITTED(expert_M), plain(expert_M), atol=2e-5)


def test_assignments_of_no_expert_add_nothing():
    expert_M = loads(C)
    expert_M[::3] = E
    np.testing.assert_allclose(JITTED(expert_M), plain(expert_M), atol=2e-5)


@pytest.mark.parametrize(("first", "is_every"), [(C, False), (C + 1, True)])
def test_every_expert_computes_every_token_where_places_are_too_few(first, is_every, monkeypatch):
    def nothing(act, few):
        del act
        return jnp.zeros_like(few.x_TD)

    monkeypatch.setattr(direct, "_every_expert", nothing)
    assert (np.abs(run(loads(first))).max() == 0) == is_every


@pytest.mark.parametrize(
    ("num_assignments", "num_experts", "num_places"),
    [
        (T * K, E, C),
        # 5 of each, of which twice are 10.
        (40, 8, 16),
        # No fewer than these take less time.
        (8, 8, 8),
        (64, 64, 8),
    ],
)
def test_places_are_twice_the_share(num_assignments, num_experts, num_places):
    assert direct.places(num_assignments, num_experts) == num_places


def test_a_broken_token_breaks_no_other():
    x_TD = weights()[0]
    x_TD[5] = np.nan
    broken_T = np.isnan(JITTED(loads(3), x_TD)).any(1)
    assert broken_T[5] and broken_T.sum() == 1
