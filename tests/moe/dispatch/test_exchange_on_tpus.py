"""What the real compiler of TPUs makes of the ways in which tokens travel: what is sent, over which
network, and what is computed meanwhile. Nothing is run, and no TPU is needed.

Skipped where libtpu is not installed (pip install libtpu); in a process of its own, for libtpu is
loaded once and by one process at a time.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.plan.hlo import program

ROOT = Path(__file__).parents[3]
# T tokens of a device, D wide, k experts of a token, E experts, in two bytes.
T, D, K, E, WIDTH = 2048, 1024, 2, 8, 2
PROGRAM = f"""
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from moe_jax.moe.dispatch import DISPATCHERS, chunks
from moe_jax.moe.dispatch.contract import Experts
from moe_jax.moe.dispatch.layout import Shape
from moe_jax.moe.experts.grouped_matmul import expert_ffn
from moe_jax.moe.routing.contract import Routing
from moe_jax.parallel import chip_flags, mesh
from moe_jax.parallel.mesh import BATCH, P

name, options, num_chunks, slices, backward = json.loads(sys.argv[1])
more = {{"num_slices": slices}} if slices > 1 else {{}}
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", **more).devices
n, T, D, K, E = len(devices), {T}, {D}, {K}, {E}
options = DISPATCHERS[name].options(**options)

def on_device(x, expert, gate, w_in, w_out, in_shared, out_shared):
    token = jnp.repeat(jnp.arange(T, dtype=jnp.int32), K)
    routing = Routing(token, expert.reshape(-1), gate.reshape(-1), {{}}, per_token=K)
    def grouped(x, gate, start, size, block):
        with jax.named_scope("experts"):
            return expert_ffn(x, gate, start, size, w_in, w_out, activation="swiglu", block=block)
    y, _ = chunks.dispatched(
        DISPATCHERS[name], x, routing, Experts(grouped), options=options, num_chunks=num_chunks,
        shape=Shape(E, T, T * K, T * K, K, T // 4, n))
    with jax.named_scope("shared"):
        shared = jnp.maximum(x @ in_shared, 0) @ out_shared
    return jax.lax.psum(y, "model") + shared

with jax.set_mesh(mesh.make(mesh.Lengths(expert=n), devices, "expert")):
    def array(shape, dtype, *spec):
        sharding = NamedSharding(jax.sharding.get_mesh(), P(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    rows = (array((n * T, D), "bfloat16", BATCH), array((n * T, K), "int32", BATCH),
            array((n * T, K), "bfloat16", BATCH))
    weights = (array((E, D, 2, 1024), "bfloat16", "expert"),
               array((E, 1024, D), "bfloat16", "expert"),
               array((D, 1024), "bfloat16"), array((1024, D), "bfloat16"))
    specs = tuple(z.sharding.spec for z in (*rows, *weights))
    layer = jax.shard_map(on_device, in_specs=specs, out_specs=P(BATCH))
    def both(x, expert, gate, *weights):
        y, pull = jax.vjp(lambda x, gate, *w: layer(x, expert, gate, *w), x, gate, *weights)
        return y, pull(y)
    flags = dict(chip_flags.of(jax.sharding.get_mesh(), True))
    lowered = jax.jit(both if backward else layer).lower(*rows, *weights)
    print(lowered.compile(compiler_options=flags).as_text())
"""
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu, the compiler of TPUs, is missing",
    ),
]


def compiled(name, options, num_chunks=1, slices=1, backward=False):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # It looks for no TPU, and does not mind another process that has it.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5e-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    how = json.dumps([name, options, num_chunks, slices, backward])
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def collectives(text, slices=1):
    lengths = {"stage": 1, "data": 1, "expert": 4 * slices, "seq": 1, "model": 1}
    domains = [device // 4 for device in range(4 * slices)]
    return program.read(text, lengths, domains=domains).collectives


# Numbers of assignments travel beside tokens: less than this part.
BESIDE = 0.02


@pytest.mark.parametrize(
    ("exchange", "rows"),
    [
        # There and back, forward and backward. Of n = 4 devices: k T 3/4 rows or 3 T.
        ("auto", 4 * K * T * 3 // 4),
        ("gather", 4 * 3 * T),
    ],
)
def test_bytes_are_those_of_theory(exchange, rows):
    """`auto` is ragged here: k = 2 is less than 4 devices."""
    text = compiled("dropless", {"exchange": exchange}, backward=True)
    assert (" ragged-all-to-all-start(" in text) == (exchange == "auto")
    # The gradients of the shared experts, and of gates, are all-reduced.
    found = [one for one in collectives(text) if one.kind != "all-reduce"]
    num_bytes = sum(one.num_bytes for one in found)
    assert 1 <= num_bytes / (rows * D * WIDTH) < 1 + BESIDE


def test_a_token_crosses_between_slices_once():
    """T rows each way; without `slices` there are k T / 2, which a message pads besides."""
    text = compiled("dropless", {"exchange": "ragged", "slices": 2}, slices=2)
    far = sum(one.far for one in collectives(text, slices=2))
    assert 1 <= far / (2 * T * D * WIDTH) < 1 + BESIDE


KERNEL, SHARED = "pallas_call", "shared/dot_general"


@pytest.mark.parametrize("name", ["dropless", "capacity"])
def test_chunks_travel_while_experts_compute(name):
    """In the order of the compiled program, kernels of experts stand between the start and the
    end of an exchange, and the shared experts too; of one chunk only these can.
    """
    options = {"exchange": "ragged"} if name == "dropless" else {}
    assert KERNEL in beside(compiled(name, options, num_chunks=2))
    whole = beside(compiled(name, options))
    assert SHARED in whole and KERNEL not in whole


def beside(text):
    """The scopes of what is computed between the start and the end of an exchange of tokens."""
    lines = text[text.index("\nENTRY ") :].splitlines()
    scopes, running = "", set()
    for line in lines:
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*? [\w\-]*all-to-all-(start|done)\(", line)
        if found and found[2] == "start":
            # Those of whole numbers and gates are short.
            if f"{D}" in line or f"{D // 2}" in line:
                running.add(found[1])
        elif found:
            running -= set(re.findall(r"%([\w.\-]+)", line))
        elif running:
            scopes += line
    return scopes
