"""Knock-out: what an expert is worth, and who may go round it; and the flags of the command `probe`."""

import argparse
import json

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from instrument_cases import loss, probed, recorded, seen, with_

from moe_jax.commands import probe as command
from moe_jax.errors import UserError
from moe_jax.instruments import held_out, knockout, replay
from moe_jax.moe import probe


@pytest.fixture
def run(float64):
    with jax.set_mesh(meshes.make(1, 1, 1)):
        yield probed()


def test_an_expert_removed_is_an_expert_that_gives_zero(float64):
    with jax.set_mesh(meshes.make(2, 2, 2)):
        run = probed((2, 2, 2), {"model.moe.dispatcher": "capacity"})
        for layer, expert in ((0, 1), (1, 3)):
            zero = lambda moe, e=expert: {"w_out": np.where(np.arange(4)[:, None, None] == e, 0, moe["w_out"])}
            removed = loss(run, **knockout.told(run, "removed_BME", layer, expert))
            np.testing.assert_allclose(removed, loss(run, with_(run, layer, zero)), rtol=1e-13)
            assert np.abs(removed - loss(run)).max() > 1e-3


def test_an_expert_that_nobody_chose_is_worth_nothing(float64):
    """Two equal columns of the gate tie, and the tie goes to the lower expert: with k = 1 expert 2 takes nothing."""
    with jax.set_mesh(meshes.make(1, 1, 1)):
        run = probed(changes={"model.moe.routers.top_k.k": 1})
        twin = lambda moe: {"gate": moe["gate"][:, [0, 1, 1, 3]]}
        run = run._replace(params=with_(run, 1, twin))
        for way in knockout.WAYS:
            worth = knockout.measure(run, way)
            assert (worth.share_LEZ[1, 2] == 0).all() and np.abs(worth.change_LEZ[1, 2]).max() < 1e-13
            assert np.abs(worth.change_LEZ[1, 3]).max() > 1e-5
            if way == "around":  # the twin of expert 1 takes its tokens, but is another network
                assert np.abs(worth.change_LEZ[1, 1]).max() > 1e-5


def test_round_an_expert_means_the_next_best(run):
    fields = recorded(run, probe.INPUTS, **knockout.told(run, "barred_BME", 0, 2))
    logits = np.einsum("BSD,DE->BSE", fields["input"][0], held_out.gates(run, "the test")[0])
    logits[..., 2] = -np.inf
    valid = run.batches[0].segment_BS > 0
    np.testing.assert_array_equal(fields["expert"][0][valid], np.argsort(-logits, -1)[valid][:, :2])
    chosen = np.take_along_axis(np.exp(logits), fields["expert"][0].clip(0, 3), -1)[valid]
    np.testing.assert_allclose(fields["gate"][0][valid], chosen / chosen.sum(-1, keepdims=True), rtol=1e-12)
    assert (fields["expert"][1] == 2).any()


@pytest.mark.parametrize("router", ["sigmoid", "quantile"])
def test_round_an_expert_whatever_its_bias(float64, router):
    """Expert 2 has a bias above every affinity: all take it, and none where it is barred."""
    with jax.set_mesh(meshes.make(1, 1, 1)):
        run = probed(changes={"model.moe.router": router})
        biased = lambda z: jnp.zeros_like(z).at[..., 2].set(2.0)
        run = run._replace(router_state=jax.tree.map(biased, run.router_state))
        valid = run.batches[0].segment_BS > 0
        assert (recorded(run, probe.ROUTING)["expert"][0][valid] == 2).any(-1).all()
        assert not (recorded(run, probe.ROUTING, **knockout.told(run, "barred_BME", 0, 2))["expert"][0] == 2).any()


def test_a_router_without_logits_is_not_asked_for_them(float64, tmp_path):
    with jax.set_mesh(meshes.make(1, 1, 1)):
        run = probed(changes={"model.moe.router": "uniform"})
        with pytest.raises(UserError, match="only a router with a linear gate can be told to go round an expert"):
            knockout.measure(run, "around")
        job = command.Job(
            run.cfg, run, 1, argparse.Namespace(ways="around,removed", workdir=tmp_path, mesh=None), tmp_path
        )
        command.run_knockout(job)
        found = json.loads((tmp_path / "knockout.json").read_text())["knockout"]
        assert "only a router with a linear gate" in found["around"]["note"] and "change_LEZ" in found["removed"]
        with pytest.raises(UserError, match='"uniform" has no linear gate, which balanced replay needs'):
            replay.balanced(seen(run)._replace(probs_LBSE=lambda: replay._probabilities(run, np.zeros(0))))


def test_draws_the_heat_map(tmp_path):
    rng = np.random.default_rng(0)
    change_LEZ = rng.normal(size=(5, 8, 3))
    change_LEZ[:, :, 1] = np.nan  # a domain without rows
    worth = knockout.Worth(np.array([1, np.nan, 1]), change_LEZ, np.full((5, 8, 3), 1 / 8), np.full((5, 8), 1 / 8))
    knockout.draw(worth, ["drama", "verse", "novel"], "removed", tmp_path / "knockout.png")
    assert (tmp_path / "knockout.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--what", "replay,knock"], "--what: 'knock' is no instrument"),
        (["--ways", "aroun"], "--ways: 'aroun' is not known"),
        (["--batches", "-1"], "--batches -1 must be at least 0"),
        (["--seed", "-5"], "--seed -5 must be at least 0"),
        (["--steps", "2", "--frozen", "1"], "--frozen 1 is of replay without training"),
        (["--num_processes", "2"], "need --coordinator"),
    ],
)
def test_mistakes_in_flags(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        command.main(["--workdir", str(tmp_path), *flags])
