"""XLA's compiler for GPUs takes what is chosen for them: nothing is run, and no GPU is needed.

Skipped where the CUDA plugin of jax is not installed; in a process of its own, for jax looks for
plugins once.
"""

import pytest
from compile_cases import needs_cuda, told_by

PROGRAM = """
import json, re
import jax
from moe_jax.models.attention_core import attention, causal
from moe_jax.parallel import chip_flags
from moe_jax.plan import topology

(device,) = topology.devices(topology.parse("h100:1x1"))
one = jax.sharding.SingleDeviceSharding(device)
options = dict(chip_flags.of_kind(device.device_kind)) | {"xla_gpu_autotune_level": "0"}

def temporary(kernel, S):
    def run(q, k, v, segment):
        def forward(q, k, v):
            return attention(q, k, v, causal(segment), scale=0.1, kernel=kernel)
        o, pull = jax.vjp(forward, q, k, v)
        return o, pull(o)

    def queries(heads):
        return jax.ShapeDtypeStruct((1, S, heads, 128), "bfloat16", sharding=one)

    segment = jax.ShapeDtypeStruct((1, S), "int32", sharding=one)
    # On the mesh of the chip it is that platform's code which is traced.
    mesh = jax.sharding.Mesh([device], "x")
    with jax.set_mesh(mesh):
        lowered = jax.jit(run).lower(queries(8), queries(2), queries(2), segment)
    compiled = lowered.compile(compiler_options=options)
    kernels = len(re.findall("xla.gpu.triton", compiled.as_text()))
    return compiled.memory_analysis().temp_size_in_bytes, kernels

print(json.dumps({kernel: [temporary(kernel, S) for S in (2048, 8192)]
                  for kernel in ("triton", "chunks")}))
"""


@pytest.mark.full
@needs_cuda
def test_the_flash_attention_of_jax_compiles_for_a_gpu():
    found = told_by(PROGRAM)
    (short, kernels), (long, _) = found["triton"]
    # Forward, and backward what prepares it and what makes the gradients.
    assert kernels >= 3 and long < 4.5 * short
    # Scores never reach the memory.
    (of_chunks, none), _ = found["chunks"]
    assert none == 0 and short < of_chunks
