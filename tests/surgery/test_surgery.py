"""`convert surgery`: plans by hand, arrays by hand, and whole runs."""

import jax
import meshes
import numpy as np
import pytest
import surgery_cases
from suites import normal

from moe_jax.__main__ import main as entry
from moe_jax.commands import fsck
from moe_jax.errors import UserError
from moe_jax.moe.routing import ROUTERS, hash, quantile, relu, sigmoid, switch, uniform
from moe_jax.run import open_run
from moe_jax.surgery import mover, operations, snapshot
from moe_jax.surgery.operate import Asked, operated
from moe_jax.surgery.operations import There
from moe_jax.surgery.weights import gaps

PROMISED = 1e-12
LOAD = np.array([[5.0, 0.0, 9.0, 1.0], [4.0, 8.0, 0.0, 2.0]])
THERE = There(2, 4, LOAD)
KEEP = Asked(0.0, 0, 1.0)
SMALL = {"model.repeats": 2, "model.moe.num_experts": 4, "data.seq_len": 16}
SMALL |= {"model.moe.router": "sigmoid", "model.moe.shared_experts": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with experts that stopped half-way; its biases have moved."""
    return surgery_cases.write(tmp_path_factory.mktemp("experts"), SMALL)


@pytest.fixture(scope="module")
def state(trained):
    return snapshot.read(open_run(trained))


def test_plans_by_hand():
    assert operations.permute(THERE, [3, 1, 0, 2], 0).index.tolist() == [[3, 1, 0, 2]] * 2
    drawn = operations.permute(THERE, None, 1).index
    assert (np.sort(drawn, 1) == np.arange(4)).all()
    parts = operations.split(THERE, 2, "slices")
    assert parts.index[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and parts.slices == 2
    more = operations.grow(THERE, 6, None)
    assert more.index.tolist() == [[0, 1, 2, 3, 2, 0], [0, 1, 2, 3, 1, 0]]
    assert more.new[0].tolist() == [False] * 4 + [True] * 2
    assert operations.prune(THERE, [1], None).index.tolist() == [[0, 2, 3]] * 2
    assert operations.prune(THERE, None, 2).index.tolist() == [[0, 2], [0, 1]]
    assert operations.revive(THERE, None, 0.1).index.tolist() == [[0, 2, 2, 3], [0, 1, 1, 3]]
    assert operations.revive(THERE, [0, 1], None).index[0].tolist() == [3, 2, 2, 3]
    merged = operations.merge(THERE, [[2, 0]], by_load=True)
    assert merged.index[0].tolist() == [0, 1, 3]
    np.testing.assert_allclose(merged.weights[0, 0], [5 / 14, 0, 9 / 14, 0])
    even = operations.merge(THERE, [[0, 1]], by_load=False).weights[1]
    assert even.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: operations.permute(THERE, [0, 0, 1, 2], 0), "each of the experts 0 to 3 once"),
        (lambda: operations.grow(THERE, 4, None), "must be more than the 4"),
        (lambda: operations.prune(THERE, [4], None), "there is no expert 4"),
        (lambda: operations.prune(THERE, [0, 1, 2, 3], None), "one must stay"),
        (lambda: operations.prune(THERE, None, 4), "between 1 and 3"),
        (lambda: operations.merge(THERE, [[0, 1], [1, 2]], False), "an expert twice"),
        (lambda: operations.revive(THERE, None, 0.0), "nothing to revive"),
        (lambda: operations.grow(There(2, 4, None), 5, None), "which this run has not"),
    ],
)
def test_mistakes(run, message):
    with pytest.raises(UserError, match=message):
        run()


def test_routers_say_what_surgery_may_do():
    assert switch.ROUTER.multiplied(switch.Options(), 2) is None
    assert relu.ROUTER.multiplied(relu.Options(k=2, max_active=3), 2) == relu.Options(4, 6)
    numbers = hash.ROUTER.renumbered(hash.Options(), [1, 0], 2)
    assert "by their numbers" in numbers
    assert not uniform.ROUTER.renumbered(uniform.Options(), [0, 0, 1, 1], 2)
    assert uniform.ROUTER.renumbered(uniform.Options(), [0, 1, 0, 1], 2)
    grouped = sigmoid.Options(num_groups=2, top_groups=1)
    renumbered = sigmoid.ROUTER.renumbered
    assert not renumbered(grouped, [3, 2, 0, 1], 4)
    assert not renumbered(grouped, [0, 2], 4)
    assert "would be mixed" in renumbered(grouped, [0, 2, 1, 3], 4)
    assert "make no 2 groups" in renumbered(grouped, [0, 1, 2], 4)
    new = np.array([False, False, True])
    state = {"bias": np.array([0.3, -0.2, 0.0])}
    for router, options in ((sigmoid, sigmoid.Options()), (quantile, quantile.Options())):
        quiet = router.ROUTER.silenced(options, state, new)["bias"]
        # An affinity of 1 does not lift a new one above an old one of 0.
        assert quiet[2] + 1 < quiet[:2].min() and quiet[:2].tolist() == state["bias"][:2].tolist()
    assert sigmoid.ROUTER.silenced(sigmoid.Options(score="softmax"), state, new) is None


def test_slices_and_noise_by_hand():
    x = np.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    parts = mover._sliced(np.repeat(x, 2, 0), 0, 1, 2)
    np.testing.assert_array_equal(parts[:2], [x[0, :2], x[0, 2:]])
    np.testing.assert_array_equal(parts[3], x[1, 2:])
    plan = operations.revive(THERE, [1], None)
    cut = np.ones((4, 5))
    cut[:, 0] = 0
    noisy = mover.with_noise(cut, 0, "moe/experts/w_in", plan, 0, 0.5, 0)
    assert (
        (noisy[1, 1:] != 1).all()
        and (noisy[:, 0] == 0).all()
        and (noisy[[0, 2, 3]] == cut[0]).all()
    )


def gap(old, done):
    with jax.set_mesh(meshes.make(1, 1, 1)):
        before = snapshot.weights(old, old.arrays)
        return gaps(before, [snapshot.weights(done.snapshot, done.exact)])[0][0]


PROMISES = {
    "slices": lambda there: operations.split(there, 2, "slices"),
    "copies": lambda there: operations.split(there, 3, "copies"),
    "grow": lambda there: operations.grow(there, 6, [1, 3]),
}


@pytest.mark.parametrize("operation", normal(["copies", "grow"], PROMISES))
def test_the_function_is_kept(state, operation):
    done = operated(state, PROMISES[operation](There(2, 4, None)), KEEP)
    assert not done.reasons and not done.anew
    assert gap(state, done) <= PROMISED


@pytest.mark.full
@pytest.mark.parametrize("how", ["slices", "copies"])
@pytest.mark.parametrize("name", [n for n in ROUTERS if not ROUTERS[n].replays])
def test_every_router_is_split_or_says_why(tmp_path, name, how):
    changes = {**SMALL, "model.moe.router": name, "model.allow_leak": True}
    if ROUTERS[name].num_slots(ROUTERS[name].options()):
        changes["model.moe.dispatcher"] = "slots"
    old = snapshot.read(open_run(surgery_cases.write(tmp_path / "run", changes)))
    try:
        done = operated(old, operations.split(There(2, 4, None), 2, how), KEEP)
    except UserError as error:
        assert name in ("switch", "hash", "random") and "does not go with that" in str(error)
        return
    assert not done.reasons and gap(old, done) <= PROMISED


def test_merged_experts_are_means_everywhere(state):
    plan = operations.merge(There(2, 4, LOAD), [[0, 2]], by_load=True)
    done = operated(state, plan, Asked(0.0, 0, 0.5))
    block = "repeats/1/blocks/0/moe/"
    share = LOAD[1, [0, 2]] / LOAD[1, [0, 2]].sum()
    for name, factor in (
        (f"params/{block}experts/w_in", 1),
        (f"ema/{block}experts/w_out", 1),
        (f"router_state/{block}state/bias", 1),
        (f"opt_state/direction/mu/{block}experts/w_in", 0.5),
        (f"opt_state/direction/nu/{block}experts/w_in", 0.25),
    ):
        old, new = state.arrays[name], done.snapshot.arrays[name]
        np.testing.assert_allclose(new[0], factor * np.tensordot(share, old[[0, 2]], 1), rtol=1e-12)
        np.testing.assert_allclose(new[1], factor * old[1], rtol=1e-12)
    gate = f"params/{block}router/gate"
    np.testing.assert_array_equal(done.snapshot.arrays[gate][:, 2], state.arrays[gate][:, 3])


def test_a_permuted_run_trains_as_the_run_itself(trained, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    flags = ["--workdir", str(trained), "--order"]
    command = ["convert", "surgery", "permute", *flags]
    assert entry([*command, "2,0,3,1", "--out", str(out)]) == 0
    assert "computes what the old one does" in capsys.readouterr().out
    assert entry([*command, "0,1,2,3", "--out", str(again)]) == 0
    assert fsck.main([str(out)]) == 0
    moved, stayed = surgery_cases.goes_on(out), surgery_cases.goes_on(again)
    assert moved["step"] == 4
    order = [2, 0, 3, 1]
    changed = 0
    for name, x in stayed.items():
        axis = 1 if name.endswith("router/gate") else 0
        if "/moe/" in name:
            changed += 1
            x = np.take(x, order, axis)
        np.testing.assert_allclose(moved[name], x, rtol=1e-9, atol=1e-12)
    # In each of two layers 3 weights, with average and two moments, and the bias.
    assert changed == 2 * (3 * 4 + 1)


@pytest.mark.full
def test_the_busy_stay_and_the_dead_are_revived(trained, tmp_path, capsys):
    run = ["--workdir", str(trained), "--batches", "1"]
    pruned = ["convert", "surgery", "prune", "--keep", "2", "--out", str(tmp_path / "pruned")]
    assert entry([*pruned, *run]) == 0
    assert "layer 1: load " in capsys.readouterr().out
    assert open_run(tmp_path / "pruned").config.model.moe.num_experts == 2
    revived = ["convert", "surgery", "revive", "--experts", "1", "--out", str(tmp_path / "revived")]
    assert entry([*revived, *run]) == 0
    told = capsys.readouterr().out
    assert "not the same: --noise 0.01 moves the new experts" in told and "is lost" in told
    one = ["convert", "surgery", "prune", "--experts", "0,1,2", "--out", str(tmp_path / "one")]
    assert entry([*one, *run]) == 64
    said = capsys.readouterr().err
    assert "k (2)" in said and said.count("\n") == 1 and not (tmp_path / "one").exists()


def test_conversions_without_a_config_take_no_keys(capsys):
    flags = ["--workdir", "a", "--out", "b", "--config.seed=1"]
    assert entry(["convert", "compact", *flags]) == 64
    assert "changes no key of a config" in capsys.readouterr().err
