"""Knock-out: what an expert is worth, and who may go round it; and the flags of the command
`probe`.
"""

import argparse
import json
from types import SimpleNamespace

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

            def zero(moe, e=expert):
                return {"w_out": np.where(np.arange(4)[:, None, None] == e, 0, moe["w_out"])}

            removed = loss(run, request=knockout.without(run, "removed", layer, expert))
            np.testing.assert_allclose(removed, loss(run, with_(run, layer, zero)), rtol=1e-13)
            assert np.abs(removed - loss(run)).max() > 1e-3


def test_an_expert_that_nobody_chose_is_worth_nothing(float64):
    """Two equal columns of the gate tie, and the tie goes to the lower expert: with k = 1 expert 2
    takes nothing.
    """
    with jax.set_mesh(meshes.make(1, 1, 1)):
        run = probed(changes={"model.moe.routers.top_k.k": 1})

        def twin(moe):
            return {"gate": moe["gate"][:, [0, 1, 1, 3]]}

        run = run._replace(params=with_(run, 1, twin))
        for way in knockout.WAYS:
            worth = knockout.measure(run, way)
            assert (worth.share_LEZ[1, 2] == 0).all() and np.abs(
                worth.change_LEZ[1, 2]
            ).max() < 1e-13
            assert np.abs(worth.change_LEZ[1, 3]).max() > 1e-5
            if way == "around":  # the twin of expert 1 takes its tokens, but is another network
                assert np.abs(worth.change_LEZ[1, 1]).max() > 1e-5


def test_round_an_expert_means_the_next_best(run):
    fields = recorded(run, probe.INPUTS, knockout.without(run, "barred", 0, 2))
    logits = np.einsum("BSD,DE->BSE", fields["input"][0], held_out.gates(run, "the test")[0])
    logits[..., 2] = -np.inf
    valid = run.batches[0].segment_BS > 0
    np.testing.assert_array_equal(fields["expert"][0][valid], np.argsort(-logits, -1)[valid][:, :2])
    chosen = np.take_along_axis(np.exp(logits), fields["expert"][0].clip(0, 3), -1)[valid]
    np.testing.assert_allclose(
        fields["gate"][0][valid], chosen / chosen.sum(-1, keepdims=True), rtol=1e-12
    )
    assert (fields["expert"][1] == 2).any()


@pytest.mark.parametrize("router", ["sigmoid", "quantile"])
def test_round_an_expert_whatever_its_bias(float64, router):
    """Expert 2 has a bias above every affinity: all take it, and none where it is barred."""
    with jax.set_mesh(meshes.make(1, 1, 1)):
        run = probed(changes={"model.moe.router": router})

        def biased(z):
            return jnp.zeros_like(z).at[..., 2].set(2.0)

        run = run._replace(router_state=jax.tree.map(biased, run.router_state))
        valid = run.batches[0].segment_BS > 0
        assert (recorded(run, probe.ROUTING)["expert"][0][valid] == 2).any(-1).all()
        assert not (
            recorded(run, probe.ROUTING, knockout.without(run, "barred", 0, 2))["expert"][0] == 2
        ).any()


def test_a_router_without_logits_is_not_asked_for_them(float64, tmp_path):
    with jax.set_mesh(meshes.make(1, 1, 1)):
        run = probed(changes={"model.moe.router": "uniform"})
        with pytest.raises(
            UserError, match="only a router with a linear gate can be told to go round an expert"
        ):
            knockout.measure(run, "around")
        flags = argparse.Namespace(ways="around,removed", workdir=tmp_path, mesh=None, seed=0)
        command.run_knockout(
            command.Job(run.cfg, run, SimpleNamespace(step=1), flags, tmp_path, [])
        )
        found = json.loads((tmp_path / "knockout.json").read_text())["knockout"]
        assert (
            "only a router with a linear gate" in found["around"]["note"]
            and "change_LEZ" in found["removed"]
        )
        with pytest.raises(
            UserError, match='"uniform" has no linear gate, which balanced replay needs'
        ):
            replay.balanced(
                seen(run)._replace(probs_LBSE=lambda: replay._probabilities(run, np.zeros(0)))
            )


def test_changes_are_those_of_the_sums_and_lie_in_their_intervals(run):
    """The rows of a domain add up to its own sums, with bytes as the task counts them, and the same
    seed gives the same intervals.
    """
    found = knockout.measure(run, "removed", seed=3)
    sums = held_out.make_sums(run, run.cfg.model)
    inputs = held_out.put_batch(run, run.batches[0])
    before, after = (
        sums(
            run.params,
            run.router_state,
            inputs._replace(request=knockout.without(run, "removed", 1, expert)),
        )
        for expert in (None, 2)
    )
    change_Z = (after["nll"] - before["nll"]) / (np.log(2) * before["bytes"])
    np.testing.assert_allclose(found.change_LEZ[1, 2], change_Z, rtol=1e-9)
    assert (found.mean_low_LE < found.mean_LE).all() and (found.mean_LE < found.mean_high_LE).all()
    assert (found.low_LEZ < found.change_LEZ).all() and (found.change_LEZ < found.high_LEZ).all()
    again, other = (knockout.measure(run, "removed", seed=seed) for seed in (3, 4))
    np.testing.assert_array_equal(found.low_LEZ, again.low_LEZ)
    assert (found.low_LEZ != other.low_LEZ).any()


def test_probe_tells_what_it_does_and_where_its_files_are(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    flags = argparse.Namespace(
        ways="removed", workdir=tmp_path, mesh=None, seed=0, frozen="", steps=0
    )
    (tmp_path / "probe").mkdir()
    job = command.Job(run.cfg, run, SimpleNamespace(step=1), flags, tmp_path / "probe", [])
    assert command.measure(job, ["record", "knockout"]) == []
    command.tell_files(job)
    said = capsys.readouterr()
    assert (
        said.err.startswith("record: batch 1 of 1\n")
        and "\nknockout: removed, batch 1 of 1" in said.err
    )
    listed = [line.strip() for line in said.out[said.out.index("written:") :].splitlines()[1:]]
    there = {str(path) for path in (tmp_path / "probe").rglob("*") if path.is_file()}
    assert set(listed) == there and len(listed) == 4
    assert "bits per byte more when an expert is removed" in said.out and "…" not in said.out


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
