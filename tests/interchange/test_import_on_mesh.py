"""A model is put together on the devices of a mesh: each has its own part, tensor by tensor."""

import hf_cases
import jax
import meshes
import numpy as np
import pytest

from moe_jax.__main__ import main as entry
from moe_jax.checkpoint import flat
from moe_jax.errors import UserError
from moe_jax.interchange.importing import import_model, load
from moe_jax.interchange.tensors import Folder
from moe_jax.parallel.mesh import Lengths
from moe_jax.run import open_run

SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_local_experts": 4,
    "head_dim": 4,
}
MESH = Lengths(data=2, expert=2, model=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral") / "model"
    return hf_cases.saved(hf_cases.theirs("mixtral", SIZES), path, max_shard_size="8KB")


def bytes_by_device():
    """The bytes that live arrays have on each device."""
    total, counted = dict.fromkeys(jax.devices(), 0), set()
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            # A part of an array is an array as well.
            buffer = shard.data.unsafe_buffer_pointer()
            if buffer not in counted:
                counted.add(buffer)
                total[shard.device] += shard.data.nbytes
    return total


def test_each_device_has_its_own_part_alone(folder, monkeypatch):
    """While the model is read, no device holds more than its part of the parameters, and the host
    one tensor; the values are those of one device.
    """
    with jax.set_mesh(meshes.make(1, 1, 1)):
        want = {name: np.asarray(x) for name, x in flat.flatten(load(folder).parts).items()}
    before, most = bytes_by_device(), dict.fromkeys(jax.devices(), 0)
    read = Folder.read

    def counted(self, name):
        for device, now in bytes_by_device().items():
            most[device] = max(most[device], now - before[device])
        return read(self, name)

    monkeypatch.setattr(Folder, "read", counted)
    with jax.set_mesh(meshes.make(2, 2, 2)):
        loaded = load(folder, lengths=MESH)
    have = flat.flatten(loaded.parts)
    assert loaded.config.mesh == MESH and have.keys() == want.keys()
    parts = dict.fromkeys(jax.devices(), 0)
    for name, array in have.items():
        np.testing.assert_array_equal(array, want[name], err_msg=name)
        for shard in array.addressable_shards:
            parts[shard.device] += shard.data.nbytes
    whole = sum(array.nbytes for array in want.values())
    for device in jax.devices():
        assert most[device] <= parts[device] < whole / 6
    w_in = have["params/repeats/0/blocks/0/moe/experts/w_in"]
    assert w_in.shape == (4, 32, 2, 24) and w_in.addressable_data(0).shape == (2, 16, 2, 12)


def test_a_run_from_a_mesh_is_that_from_the_host(folder, tmp_path):
    with jax.set_mesh(meshes.make(1, 1, 1)):
        import_model(folder, tmp_path / "host")
    import_model(folder, tmp_path / "mesh", lengths=MESH)
    runs = [open_run(tmp_path / name, silent=True) for name in ("host", "mesh")]
    a, b = (flat.flatten(run.parameters) for run in runs)
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name], err_msg=name)
    assert "c.mesh.expert = 2" in (tmp_path / "mesh" / "config.py").read_text()


def test_tensors_that_no_device_here_has_are_not_read(folder):
    """As in a run of several processes, of which each has some of the devices."""
    from moe_jax.interchange.shards import Shards

    sharding = jax.NamedSharding(meshes.make(2, 2, 2), jax.P("expert"))
    shards = Shards(jax.ShapeDtypeStruct((4, 2), np.float32, sharding=sharding))
    shards._bounds = {device: bounds for device, bounds in shards._bounds.items() if bounds[0][0]}
    assert not shards.wants((1, slice(None))) and shards.wants((2, slice(None)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mesh", "2x2"], "--mesh 2x2: write DATAxEXPERTxMODEL, as in 2x2x2"),
        (["--mesh", "4x4x4"], "--mesh 4x4x4 has 64 devices, and there are 8: name another, or"),
        (["--simulate_devices", "8"], "--simulate_devices 8 does nothing without --mesh"),
    ],
)
def test_a_mesh_that_is_not_there_is_one_line(folder, tmp_path, capsys, words, said):
    code = entry(["convert", "import", "--from", str(folder), "--out", str(tmp_path / "o"), *words])
    errors = capsys.readouterr().err
    assert code == 64 and said in errors and errors.count("\n") == 1


def test_a_model_that_a_mesh_cannot_split_is_refused(folder):
    with (
        jax.set_mesh(meshes.make(1, 1, 8)),
        pytest.raises(UserError, match=r"model.num_heads \(4\) must be divisible by mesh.model"),
    ):
        load(folder, lengths=Lengths(model=8))
