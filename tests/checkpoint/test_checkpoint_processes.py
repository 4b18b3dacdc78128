"""A checkpoint survives kill -9 at any moment, and several processes write one together."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoint import Checkpoints

WORKER = """
import os, sys
os.environ["PJRT_NPROC"] = "64"
import jax, jax.numpy as jnp
from moe_jax.checkpoint import Checkpoints, manifest
path, kill_in_deletion = sys.argv[1], sys.argv[2] == "deletion"
if kill_in_deletion:
    import shutil
    def half_delete(path):
        os.unlink(path / min(manifest.file_names(path)))
        os.kill(os.getpid(), 9)
    shutil.rmtree = half_delete
checkpoints = Checkpoints(path, every=1, keep=2, keep_best=0)
step = checkpoints.latest()
state = {"x": jnp.zeros(4000), "repeats": {"w": jnp.zeros((2, 8))}}
if step is not None:
    state = checkpoints.restore(step, state, stacked=True)
step = step or 0
add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
while True:
    step, state = step + 1, add(state)
    checkpoints.save(step, state, metadata={}, score=None, stacked=True)
    print(step, flush=True)
"""


def worker(*args, **kwargs):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", *args], stdout=subprocess.PIPE, text=True, env=env, **kwargs
    )


def assert_restorable(path, at_least):
    checkpoints = Checkpoints(path, every=1, keep=2, keep_best=0)
    step = checkpoints.latest()
    assert step is not None and step >= at_least
    tree = {"x": jnp.zeros(4000), "repeats": {"w": jnp.zeros((2, 8))}}
    for listed in checkpoints.steps():
        got = checkpoints.restore(listed, tree, stacked=True)
        for leaf in jax.tree.leaves(got):
            np.testing.assert_array_equal(leaf, listed)
    return step


def test_survives_kill_at_random_moments(tmp_path):
    rng, last = random.Random(0), 0
    for _ in range(4):
        process = worker(WORKER, str(tmp_path), "loop")
        started = int(process.stdout.readline())
        for _ in range(rng.randrange(2, 6)):
            started = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        done = process.communicate()[0].split()
        started = int(done[-1]) if done else started
        # `started` was printed once the save before it had been committed
        last = assert_restorable(tmp_path, max(started - 1, last))


def test_survives_kill_while_deleting(tmp_path):
    process = worker(WORKER, str(tmp_path), "deletion")
    output = process.communicate(timeout=60)[0].split()
    assert process.returncode == -signal.SIGKILL
    half = tmp_path / "step_00000001"
    assert half.exists() and not (half / "moe_jax.json").exists()
    assert assert_restorable(tmp_path, 3) >= int(output[-1]) - 1
    checkpoints = Checkpoints(tmp_path, every=1, keep=2, keep_best=0)
    checkpoints.save(100, {"x": jnp.zeros(1)}, metadata={}, score=None, stacked=False)
    checkpoints.close()
    assert not half.exists()


TWO_PROCESSES = """
import os, sys
os.environ["PJRT_NPROC"] = "64"
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
address, index, path, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.distributed.initialize(address, 2, index, coordinator_bind_address=address)
from moe_jax.checkpoint import Checkpoints
from moe_jax.errors import UserError
mesh = jax.make_mesh((4,), ("data",))
jax.set_mesh(mesh)
want = np.arange(24.0, dtype=np.float32).reshape(2, 4, 3)
place = jax.NamedSharding(mesh, jax.P(None, "data", None))
tree = {"repeats": {"w": jax.make_array_from_callback(want.shape, place, lambda i: want[i])}}
checkpoints = Checkpoints(path, every=1, keep=2, keep_best=0)
assert checkpoints.latest() is None
for step in (1, 2, 3):
    checkpoints.save(step, tree, metadata={"a": step}, score=None, stacked=True)
    checkpoints.poll()
assert checkpoints.latest() == 3 and checkpoints.steps() == [2, 3], checkpoints.steps()
got = checkpoints.restore(3, tree, stacked=True)["repeats"]["w"]
for shard in got.addressable_shards:
    np.testing.assert_array_equal(shard.data, want[shard.index])
try:
    checkpoints.restore(9, tree, stacked=True)
except UserError as error:
    open(out, "w").write(str(error))
checkpoints.close()
"""


def test_two_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    path, outs = tmp_path / "sweep[1]" / "a\\b:c\n", [tmp_path / "out0", tmp_path / "out1"]
    both = [
        worker(TWO_PROCESSES, address, str(i), str(path), str(outs[i]), stderr=subprocess.PIPE)
        for i in (0, 1)
    ]
    for process in both:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors[-3000:]
    for out in outs:
        assert "there is no checkpoint of step 9" in out.read_text()
    # one process with one device reads what two wrote
    tree = {"repeats": {"w": jax.ShapeDtypeStruct((2, 4, 3), jnp.float32)}}
    got = Checkpoints(path, every=1, keep=2, keep_best=0).restore(3, tree, stacked=True)
    np.testing.assert_array_equal(got["repeats"]["w"], np.arange(24.0).reshape(2, 4, 3))
