"""Checkpoints survive kill -9 at any moment, damage is found; every mesh, and scan and loop, read
each other's.
"""

import json
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.checkpoint import Checkpoints, compare_configs, load_params, manifest
from moe_jax.errors import UserError

P = jax.P
LAYERS = 3


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def make_mesh(data, model):
    return jax.make_mesh((data, model), ("data", "model"), devices=jax.devices()[: data * model])


def params(seed, stacked=True):
    """Random parameters on the current mesh."""
    mesh, random_state = jax.sharding.get_mesh(), np.random.RandomState(seed)

    def draw(shape, *spec, dtype=np.float32):
        value = random_state.normal(size=shape).astype(dtype)
        return jax.device_put(value, jax.NamedSharding(mesh, P(*spec)))

    layers = {
        "w": draw((LAYERS, 8, 16), None, "data", "model"),
        "scale": draw((LAYERS, 8), None, None),
    }
    if not stacked:
        layers = {str(i): jax.tree.map(lambda x, i=i: x[i], layers) for i in range(LAYERS)}
    return {
        "embed": draw((16, 8), "model", "data", dtype=jnp.bfloat16),
        "layers": {"repeats": layers},
    }


def state(seed, stacked=True, step=7):
    return State(
        jnp.int32(step),
        params(seed, stacked),
        {"mu": params(seed + 100, stacked), "count": jnp.int32(step)},
    )


def open_dir(path, every=1, keep=2, keep_best=0):
    return Checkpoints(path, every=every, keep=keep, keep_best=keep_best)


def save(checkpoints, step, tree, score=None, stacked=True):
    return checkpoints.save(step, tree, metadata={"step": step}, score=score, stacked=stacked)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def mesh():
    mesh = make_mesh(2, 4)
    with jax.set_mesh(mesh):
        yield mesh


def test_round_trip_metadata_and_atomic_async_save(tmp_path, mesh):
    want = jax.device_get(state(0))
    live = state(0)
    checkpoints = open_dir(tmp_path / "c", every=5)
    assert checkpoints.latest() is None and not (tmp_path / "c").exists()
    assert [checkpoints.due(s) for s in (4, 5, 6)] == [False, True, False]
    assert save(checkpoints, 7, live)
    # the state may be donated as soon as save returns
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    live = overwrite(live)
    assert checkpoints.latest() == 7
    assert checkpoints.metadata(7) == {"step": 7}
    assert_equal(checkpoints.restore(7, live, stacked=True), want)
    assert not save(checkpoints, 7, live)
    checkpoints.close()
    # an abstract state from eval_shape knows its mesh only by its axes
    reader = open_dir(tmp_path / "c")
    abstract = jax.eval_shape(lambda s: jax.tree.map(lambda x: x + 0, s), live)
    got = reader.restore(7, abstract, stacked=True)
    assert_equal(got, want)
    assert got.params["layers"]["repeats"]["w"].sharding.spec == P(None, "data", "model")
    names = json.loads((tmp_path / "c" / "step_00000007" / "moe_jax.json").read_text())["arrays"]
    assert names["params/layers/repeats/2/w"] == [[8, 16], "float32"]
    assert names["opt_state/mu/embed"] == [[16, 8], "bfloat16"]
    assert {"step", "opt_state/count"} < set(names)


def test_a_save_commits_itself(tmp_path):
    """It waits for no further call, so that a kill costs no more than what came after the save."""
    checkpoints = open_dir(tmp_path)
    save(checkpoints, 1, {"x": jnp.ones(1)})
    end = time.monotonic() + 60
    while not (tmp_path / "step_00000001" / "moe_jax.json").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert open_dir(tmp_path).latest() == 1
    checkpoints.close()


# (data, model) of 1, 2, 4 and 8 devices.
SPLITS = ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4), (1, 8))


@pytest.mark.parametrize("saved_on", [(1, 1), (1, 2), (2, 2), (8, 1)])
def test_restores_bit_for_bit_on_other_meshes(tmp_path, saved_on):
    with jax.set_mesh(make_mesh(*saved_on)):
        first = state(1)
        want = jax.device_get(first)
        with_saved = open_dir(tmp_path)
        save(with_saved, 1, first)
        with_saved.close()
    for data, model in SPLITS:
        with jax.set_mesh(make_mesh(data, model)):
            got = open_dir(tmp_path).restore(1, state(2), stacked=True)
            assert_equal(got, want)
            assert got.params["embed"].sharding.mesh.size == data * model
    with_single_device = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), want)
    assert_equal(open_dir(tmp_path).restore(1, with_single_device, stacked=True), want)


@pytest.mark.parametrize("saved_stacked", [True, False])
def test_scan_and_loop_models_read_each_other(tmp_path, mesh, saved_stacked):
    checkpoints = open_dir(tmp_path)
    save(checkpoints, 1, state(3, saved_stacked), stacked=saved_stacked)
    got = checkpoints.restore(1, state(4, not saved_stacked), stacked=not saved_stacked)
    assert_equal(got, jax.device_get(state(3, not saved_stacked)))


def test_a_stack_split_over_its_layers(tmp_path):
    """A pipeline splits this dimension, which cannot be indexed before it is moved."""
    mesh = make_mesh(2, 4)
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, P("data", "model"))
        want = np.arange(16.0).reshape(4, 4)
        tree = {"repeats": {"w": jax.device_put(want, place)}}
        checkpoints = open_dir(tmp_path)
        save(checkpoints, 1, tree)
        got = checkpoints.restore(1, tree, stacked=True)["repeats"]["w"]
        np.testing.assert_array_equal(got, want)
        assert got.sharding == place


class Pair(nnx.Module):
    def __init__(self, key):
        self.w = nnx.Param(jax.random.normal(key, (2, 4)))


class Model(nnx.Module):
    def __init__(self, key, scan):
        keys = jax.random.split(key, 2)
        self.repeats = jax.vmap(Pair)(keys) if scan else nnx.List([Pair(k) for k in keys])


def test_nnx_states_have_the_names_of_their_variables(tmp_path):
    scan, loop = (nnx.split(Model(jax.random.key(0), kind))[1] for kind in (True, False))
    checkpoints = open_dir(tmp_path)
    save(checkpoints, 1, scan)
    assert set(manifest.read(checkpoints.path(1))["arrays"]) == {"repeats/0/w", "repeats/1/w"}
    assert_equal(checkpoints.restore(1, loop, stacked=False), loop)
    assert_equal(
        checkpoints.restore(1, nnx.to_pure_dict(loop), stacked=False), nnx.to_pure_dict(loop)
    )


def test_keeps_the_last_and_the_best(tmp_path):
    checkpoints = open_dir(tmp_path, keep=2, keep_best=2)
    for step, score in enumerate([3.0, 1.0, float("nan"), 2.0, None, 4.0, 5.0]):
        save(checkpoints, step, {"x": jnp.float32(step)}, score)
    assert checkpoints.steps() == [1, 3, 5, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_0000000{s}" for s in (1, 3, 5, 6)]
    checkpoints.close()


def test_misfits_are_named_with_both_values(tmp_path, mesh):
    checkpoints = open_dir(tmp_path)
    save(checkpoints, 1, state(5))
    other = state(5)._replace(step=jnp.float32(0))
    other.params["layers"]["repeats"]["w"] = jnp.zeros((LAYERS, 8, 32))
    other.params["extra"] = other.params.pop("embed")
    with pytest.raises(UserError) as error:
        checkpoints.restore(1, other, stacked=True)
    message = str(error.value)
    assert (
        "params/layers/repeats/1/w is float32[8, 16] in the checkpoint and float32[8, 32] in this "
        "run" in message
    )
    assert "params/embed is bfloat16[16, 8] in the checkpoint and absent in this run" in message
    assert "params/extra is absent in the checkpoint and bfloat16[16, 8] in this run" in message
    assert "step is int32[] in the checkpoint and float32[] in this run" in message
    assert "train.init_from" in message
    with pytest.raises(
        UserError,
        match=r"params/layers/repeats/2/w is float32\[8, 16\] in the checkpoint and absent",
    ):
        checkpoints.restore(
            1, jax.tree.map(lambda x: x[:2] if x.ndim == 3 else x, state(5)), stacked=True
        )
    with pytest.raises(UserError, match=r"there is no checkpoint of step 9 in .*: it has 1"):
        checkpoints.restore(9, other, stacked=True)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def largest(path):
    return max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


DAMAGES = {
    "a flipped bit": lambda path: flip(largest(path / "state")),
    "a truncated file": lambda path: os.truncate(largest(path / "state"), 10),
    "a deleted file": lambda path: (path / "state" / "_METADATA").unlink(),
    "no manifest": lambda path: (path / "moe_jax.json").unlink(),
    "a torn manifest": lambda path: os.truncate(path / "moe_jax.json", 100),
    "a foreign manifest": lambda path: (path / "moe_jax.json").write_text("[1, 2]"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_found_and_passed_over(tmp_path, what, caplog):
    checkpoints = open_dir(tmp_path, keep=3)
    trees = {step: {"x": jnp.full(1000, step, jnp.float32)} for step in (1, 2)}
    for step, tree in trees.items():
        save(checkpoints, step, tree)
    checkpoints.close()
    (tmp_path / "notes").mkdir()
    newest = tmp_path / "step_00000002"
    DAMAGES[what](newest)

    again = open_dir(tmp_path, keep=3)
    assert again.latest() == 1
    assert ("damaged" in caplog.text) == (what != "no manifest")
    assert_equal(again.restore(1, trees[1], stacked=False), trees[1])
    with pytest.raises(
        UserError, match=r"step_00000002 is damaged|there is no checkpoint of step 2"
    ):
        again.restore(2, trees[2], stacked=False)
    assert newest.exists()  # reading deletes nothing
    save(again, 2, trees[2])
    again.close()
    assert open_dir(tmp_path).latest() == 2
    assert (tmp_path / "step_00000002.damaged0").exists() == (what != "no manifest")
    assert (tmp_path / "notes").exists()


def test_all_damaged_is_an_error(tmp_path):
    checkpoints = open_dir(tmp_path)
    save(checkpoints, 1, {"x": jnp.zeros(1)})
    checkpoints.close()
    flip(largest(tmp_path / "step_00000001" / "state"))
    with pytest.raises(
        UserError, match=r"every checkpoint in .* is damaged: move that directory away"
    ):
        open_dir(tmp_path).latest()


def test_a_failed_save_surfaces_at_the_next_call(tmp_path, monkeypatch):
    checkpoints = open_dir(tmp_path)
    save(checkpoints, 1, {"x": jnp.zeros(1)})
    checkpoints.poll()
    assert checkpoints.latest() == 1

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        save(checkpoints, 2, {"x": jnp.ones(1)})
        with pytest.raises(
            RuntimeError,
            match=r"saving .*step_00000002 failed .* bytes are free .*No space left on device",
        ):
            for _ in range(1000):
                checkpoints.poll()
                time.sleep(0.01)
    assert checkpoints.latest() == 1
    assert save(checkpoints, 2, {"x": jnp.ones(1)})  # the same step can be tried again
    assert checkpoints.latest() == 2
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(3, {"x": jnp.ones(1)}, metadata={"a": object()}, score=None, stacked=False)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        save(checkpoints, 4, {"x": jnp.ones(1)})
        with pytest.raises(RuntimeError, match="step_00000004"):
            checkpoints.close()


def test_load_params_takes_what_matches(tmp_path, mesh):
    checkpoints = open_dir(tmp_path)
    old = {
        "embed": jnp.ones((4, 2)),
        "head": jnp.ones((2, 4)),
        "layers": {
            "repeats": {
                "0": {"ffn": {"w": jnp.full((2, 2), 1.0)}},
                "1": {"ffn": {"w": jnp.full((2, 2), 2.0)}},
            }
        },
    }
    save(checkpoints, 5, State(jnp.int32(5), old, ()), stacked=False)
    checkpoints.close()
    place = jax.NamedSharding(mesh, P(None, "data", None))
    new = {
        "embed": jnp.zeros((4, 2), jnp.bfloat16),
        "head": jnp.zeros((2, 8)),
        "layers": {
            "repeats": {"shared": {"w": jax.device_put(np.zeros((2, 2, 2), np.float32), place)}}
        },
        "router": jnp.zeros(3),
    }
    rename = {"layers/repeats/0/ffn": "layers/repeats/0/shared", "layers/repeats/1": "elsewhere"}
    rename |= {"layers/repeats/1/ffn": "layers/repeats/1/shared"}  # the longest prefix counts
    got, report = load_params(tmp_path, new, stacked=True, rename=rename, part="params", step=None)
    assert report.step == 5
    assert report.loaded == ["embed", "layers/repeats/shared/w"]
    assert report.renamed == [
        (f"layers/repeats/{i}/ffn/w", f"layers/repeats/{i}/shared/w") for i in (0, 1)
    ]
    assert report.left == [
        ("head", "head is [2, 4] in the checkpoint and [2, 8] here"),
        ("router", "router is not in the checkpoint"),
    ]
    assert got["embed"].dtype == jnp.bfloat16
    w = got["layers"]["repeats"]["shared"]["w"]
    np.testing.assert_array_equal(w, np.stack([np.full((2, 2), 1.0), np.full((2, 2), 2.0)]))
    assert w.sharding == place
    assert got["head"] is new["head"] and got["router"] is new["router"]


def test_load_params_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"train.init_from: there is no checkpoint in .*"):
        load_params(
            tmp_path, {"x": jnp.zeros(1)}, stacked=False, rename={}, part="params", step=None
        )
    checkpoints = open_dir(tmp_path)
    save(checkpoints, 1, State(jnp.int32(1), {"a": jnp.zeros(1), "b": jnp.zeros(1)}, ()))
    checkpoints.close()
    with pytest.raises(
        UserError, match=r"no parameter of .*step_00000001 matches.* It has a, b; this model has x"
    ):
        load_params(
            tmp_path, {"x": jnp.zeros(1)}, stacked=False, rename={}, part="params", step=None
        )


def test_compare_configs():
    old = json.loads(
        json.dumps(
            {"model": {"d": 128, "period": ("moe",), "moe": {}}, "eval": {"every": 5}, "seed": 0}
        )
    )
    compare_configs(
        old,
        {"model": {"d": 128, "period": ("moe",), "moe": {}}, "eval": {"every": 7}, "seed": 0},
        ("eval",),
    )
    new = {"model": {"d": 64, "period": ("dense",), "moe": {}}, "eval": {"every": 5}, "evaluate": 1}
    with pytest.raises(UserError) as error:
        compare_configs(old, new, ("eval",))
    message = str(error.value)
    assert "evaluate was absent, is 1; model.d was 128, is 64; " in message
    assert 'model.period was ["moe"], is ["dense"]; seed was 0, is absent' in message
    assert "Set these keys back" in message
