"""XLA's compiler for GPUs takes the experts' kernel for Hopper: nothing is run, no GPU is needed.

Skipped where the CUDA plugin of jax is not installed; in a process of its own, for jax looks for
plugins once. The plugin has Mosaic and the assembler of NVIDIA, so what comes out is machine code.
"""

import json

import pytest
from compile_cases import needs_cuda, told_by

PROGRAM = """
import json, os, pathlib, sys
out = sys.argv[3]
# Mosaic reads them when it compiles.
os.environ |= {"MOSAIC_GPU_DUMP_TO": out, "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from moe_jax.moe.experts.grouped_matmul import expert_ffn
from moe_jax.parallel import chip_flags
from moe_jax.plan import topology

devices = topology.devices(topology.parse(sys.argv[1]))
mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "model"),
            axis_types=(jax.sharding.AxisType.Explicit,) * 2)
options = dict(chip_flags.of_kind(devices[0].device_kind)) | {"xla_gpu_autotune_level": "0"}
# As wide as OLMoE.
R, D, F, E = 8192, 2048, 1024, 8
block = tuple(json.loads(sys.argv[2]))

def array(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

rows = array((2 * R, D), "bfloat16", "data"), array((2 * R,), "bfloat16", "data")
layout = [array((2 * E,), "int32", "data")] * 2
weights = (array((E, D, 2, F), "float32", None, None, None, "model"),
           array((E, F, D), "float32", None, "model"))

def on_device(*args):
    y = expert_ffn(*args, activation="swiglu", block=block, kernel="pallas_hopper")
    return jax.lax.psum(y, "model")

def experts(x, gate, start, size, w_in, w_out):
    specs = tuple(z.sharding.spec for z in (*rows, *layout, *weights))
    ffn = jax.shard_map(on_device, in_specs=specs, out_specs=P("data"))
    y, pull = jax.vjp(lambda *z: ffn(z[0], z[1], start, size, *z[2:]), x, gate, w_in, w_out)
    return y, pull(y)

with jax.set_mesh(mesh):
    lowered = jax.jit(experts).lower(*rows, *layout, *weights)
text = lowered.compile(compiler_options=options).as_text()
written = [path.read_text() for path in pathlib.Path(out).iterdir() if path.suffix == ".ptx"]
told = [path.read_text() for path in pathlib.Path(out).iterdir() if path.suffix == ".ptxas"]
print(json.dumps({
    "calls": text.count('custom_call_target="mosaic_gpu_v2"'),
    "wgmma": sum(".f32.bf16.bf16" in z and "cp.async.bulk.tensor" in z for z in written),
    "assembled": sum("for 'sm_90a'" in z and "0 bytes spill stores" in z for z in told),
}))
"""


@pytest.mark.full
@needs_cuda
@pytest.mark.parametrize(
    ("topology", "block", "kernels"),
    [
        ("h100:1x4", (1024, 64), 6),
        ("h100:1x4", (512, 32), 6),
        ("h200:1x4", (256, 16), 6),
        # It has no WGMMA.
        ("a100:1x4", (1024, 64), 0),
    ],
)
def test_experts_compile_for_a_hopper_gpu(topology, block, kernels, tmp_path):
    found = told_by(PROGRAM, topology, json.dumps(block), str(tmp_path))
    # Two products forward and four backward, in a shard_map that checks what varies.
    assert found["calls"] == kernels
    # All of them are in machine code, by the units for matrices and for fetching them.
    assert found["wgmma"] == found["assembled"] == kernels
