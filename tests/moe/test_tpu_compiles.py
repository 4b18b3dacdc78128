"""The real compiler of TPUs takes what is chosen for them: nothing is run, and no TPU is needed.

Skipped where libtpu is not installed (pip install libtpu); in a process of its own, for libtpu is
loaded once and by one process at a time.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from moe_jax.models.attention_core import attention, windowed
from moe_jax.moe.experts.grouped_matmul import expert_ffn

name, dtype, numbers = sys.argv[1:]
devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
mesh = Mesh(np.array(devices[:4]).reshape(2, 2), ("data", "model"),
            axis_types=(jax.sharding.AxisType.Explicit,) * 2)
R, D, F, E = 512, 256, 256, 4

def array(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

rows = array((2 * R, D), dtype, "data"), array((2 * R,), dtype, "data")
layout = [array((2 * E,), "int32", "data")] * 2
weights = (array((E, D, 2, 2 * F), dtype, None, None, None, "model"),
           array((E, 2 * F, D), dtype, None, "model"))

def on_device(*args):
    y = expert_ffn(*args, activation="swiglu", block=(128, 16), numbers=numbers)
    return jax.lax.psum(y, "model")

def experts(x, gate, start, size, w_in, w_out):
    specs = tuple(z.sharding.spec for z in (*rows, *layout, *weights))
    ffn = jax.shard_map(on_device, in_specs=specs, out_specs=P("data"))
    y, pull = jax.vjp(lambda *z: ffn(z[0], z[1], start, size, *z[2:]), x, gate, w_in, w_out)
    return y, pull(y)

one = jax.sharding.SingleDeviceSharding(devices[0])
q = jax.ShapeDtypeStruct((1, 2048, 2, 128), dtype, sharding=one)
segment = jax.ShapeDtypeStruct((1, 2048), "int32", sharding=one)

def attend(kernel):
    def run(q, k, v, segment):
        def forward(q, k, v):
            return attention(q, k, v, windowed(segment, 700), scale=0.1, kernel=kernel)
        o, pull = jax.vjp(forward, q, k, v)
        return o, pull(o)
    return jax.jit(run).lower(q, q, q, segment).compile()

with jax.set_mesh(mesh):
    text = jax.jit(experts).lower(*rows, *layout, *weights).compile().as_text()
chunks, splash = attend("auto"), attend("splash")
KERNEL = 'custom_call_target="tpu_custom_call"'
narrow = {"int8": "s8[", "float8": "f8e4m3fn["}.get(numbers, "none")
calls = [line for line in text.splitlines() if KERNEL in line]
print(json.dumps({"experts": len(calls), "splash": splash.as_text().count(KERNEL),
                  "narrow": sum(narrow in line for line in calls),
                  "temporary": chunks.memory_analysis().temp_size_in_bytes}))
"""


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler of TPUs, is missing"
)
@pytest.mark.parametrize(
    ("topology", "dtype", "numbers"),
    [
        ("v5e:2x2", "bfloat16", "full"),
        ("v6e:2x2", "float32", "full"),
        ("v5e:2x2", "bfloat16", "int8"),
        ("v6e:2x2", "bfloat16", "float8"),
    ],
)
def test_experts_and_attention_compile_for_a_tpu(topology, dtype, numbers):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # It looks for no TPU, and does not mind another process that has it.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, topology, dtype, numbers],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    # Two products forward and four backward, in a shard_map that checks what varies.
    assert figures["experts"] == 6
    # Those of the forward pass are given narrow numbers.
    assert figures["narrow"] == (0 if numbers == "full" else 2)
    # Forward, and backward one for queries and one for keys and values.
    assert figures["splash"] == 3
    # The scores of both heads would be 32 MB.
    assert figures["temporary"] < 16e6
