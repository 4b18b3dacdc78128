"""The experts' kernel for Hopper GPUs, interpreted on a CPU, against all experts on all rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_cases import all_experts, assert_near, value_and_gradient
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import GPUSharedMemory
from jax._src.state.types import TransformedRef, TransposeTransform
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.moe.experts import grouped_matmul, hopper, pallas_hopper
from moe_jax.moe.experts.grouped_matmul import KERNELS, expert_ffn
from moe_jax.moe.experts.network import Case, KernelSizes, Layout

NUM_ROWS, D, F = 192, 64, 128
BLOCK = (64, 16)

oracle = functools.partial(all_experts, activation="gelu")

# (start, size) of each expert, starts at multiples of 16.
LAYOUTS = {
    "uneven": ([0, 16, 112, 128], [3, 95, 16, 20]),
    # A tile reaches past an expert's rows into the next one's, and past the end.
    "an expert without rows": ([0, 80, 80, 144], [70, 0, 60, 48]),
    "all on one": ([0, 0, 192, 192], [0, 192, 0, 0]),
    "nobody": ([0, 0, 0, 0], [0, 0, 0, 0]),
    "gaps": ([32, 64, 96, 128], [9, 1, 32, 5]),
}


def with_copies(wgmma, sum_ref, *factors):
    """As wgmma, of copies of those factors that are read the other way round."""

    def is_turned(ref):
        return isinstance(ref, TransformedRef) and isinstance(
            ref.transforms[-1], TransposeTransform
        )

    turned = [ref for ref in factors if is_turned(ref)]

    def multiply(*copies):
        for copy, ref in zip(copies, turned, strict=True):
            straight = dataclasses.replace(ref, transforms=ref.transforms[:-1])
            copy[...] = straight[...].T
        gpu.commit_smem()
        left = iter(copies)
        wgmma(sum_ref, *(next(left) if is_turned(ref) else ref for ref in factors))

    pl.run_scoped(multiply, *(gpu.SMEM(ref.shape, ref.dtype) for ref in turned))


def kernel(detect_races):
    """The kernel as it is interpreted; jax 0.10 takes the wish to find races, and finds none."""
    how = InterpretGPUParams(detect_races=detect_races)
    return grouped_matmul._of_products(functools.partial(pallas_hopper.products, interpret=how))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The kernel by the name "interpreted"."""
    # The interpreter of jax 0.10 does not know a matrix that is read the other way round.
    if jax.__version_info__ < (0, 12):
        monkeypatch.setattr(gpu, "wgmma", functools.partial(with_copies, gpu.wgmma))
    monkeypatch.setitem(KERNELS, "interpreted", kernel(detect_races=True))


def make(layout, parts=1, seed=0):
    """Arguments of expert_ffn and a cotangent; rows in nobody's range hold finite garbage."""
    start, size = layout
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    x_RD, gate_R = draw(NUM_ROWS, D), draw(NUM_ROWS)
    x_RD = jnp.where(is_of(layout).any(0)[:, None], x_RD, 1e3)
    placed = jnp.asarray(start, jnp.int32), jnp.asarray(size, jnp.int32)
    weights = draw(len(start), D, parts, F), draw(len(start), F, D)
    return (x_RD, gate_R, *placed, *weights), draw(NUM_ROWS, D)


def is_of(layout):
    """[e, R]: is the row the expert's?"""
    start, size = (np.asarray(z)[:, None] for z in layout)
    row_R = np.arange(NUM_ROWS)
    return (row_R >= start) & (row_R < start + size)


def as_float32(tree):
    return jax.tree.map(lambda z: z.astype(jnp.float32) if z.dtype == jnp.bfloat16 else z, tree)


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_all_experts_on_every_layout(name):
    args, dy_RD = make(LAYOUTS[name])
    run = functools.partial(expert_ffn, activation="gelu", block=BLOCK, kernel="interpreted")
    got = value_and_gradient(run, args, dy_RD)
    assert_near(got, value_and_gradient(oracle, *as_float32((args, dy_RD))), 2e-2)
    void_R = ~is_of(LAYOUTS[name]).any(0)
    for array in got[:3]:
        assert not np.any(np.asarray(array, np.float32)[void_R])


@pytest.mark.parametrize("block", [(512, 32), (1024, 64)])
def test_products_are_exact_but_for_the_last_rounding(block):
    """Sums over many rows too, in float32; of every size of a tile and of a unit."""
    layout = [0, 64, 64, 128], [50, 0, 33, 32]
    args, b_RX = make(layout)
    a_RX, w_eXY = args[0], args[4][:, :, 0]
    is_of_eR = is_of(layout)
    c_RY = jnp.where(is_of_eR.any(0)[:, None], args[0] @ w_eXY[0], 0)
    b_RX = jnp.where(is_of_eR.any(0)[:, None], b_RX, 0)
    products = pallas_hopper.products(
        Layout(*args[2:4]), block, InterpretGPUParams(detect_races=True)
    )
    got = (
        products.product(a_RX, w_eXY),
        products.transposed(c_RY, w_eXY),
        products.outer(b_RX, c_RY),
    )
    a, b, c, w = (np.asarray(z, np.float64) for z in (a_RX, b_RX, c_RY, w_eXY))
    want = (
        np.einsum("eR,RX,eXY->RY", is_of_eR, a, w),
        np.einsum("eR,RY,eXY->RX", is_of_eR, c, w),
        np.einsum("eR,RX,RY->eXY", is_of_eR, b, c),
    )
    assert [z.dtype for z in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    own_R = is_of_eR.any(0)
    for some, exact in zip(got[:2], want[:2], strict=True):
        some = np.asarray(some, np.float64)[own_R]
        np.testing.assert_allclose(some, exact[own_R], rtol=2**-8, atol=1e-4)
    np.testing.assert_allclose(got[2], want[2], rtol=0, atol=1e-6 * np.abs(want[2]).max())


def test_on_a_mesh_equals_all_experts(monkeypatch):
    """Rows vary over data and weights do not, in a shard_map that checks what varies."""
    # The interpreter of a device that is done asserts that no barrier is left, on any device. It
    # would fail where the other one is not done, which then waits for ever.
    monkeypatch.setattr(GPUSharedMemory, "assert_no_barriers_allocated", lambda self: None)
    # That of jax 0.12 finds races on the second device that it does not find of the same rows on
    # one device.
    monkeypatch.setitem(KERNELS, "interpreted", kernel(detect_races=False))
    layouts = [LAYOUTS["uneven"], LAYOUTS["an expert without rows"]]
    made = [make(layout, seed=seed) for seed, layout in enumerate(layouts)]
    weights = made[0][0][4:]
    rows, dy = jax.tree.map(
        lambda *of_devices: jnp.stack(of_devices), *((args[:4], dy_RD) for args, dy_RD in made)
    )
    run = functools.partial(expert_ffn, activation="gelu", block=BLOCK, kernel="interpreted")

    def on_device(x, gate, start, size, w_in, w_out):
        return run(x[0], gate[0], start[0], size[0], w_in, w_out)[None]

    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        specs = (*[P("data")] * 4, P(), P())
        sharded = jax.shard_map(on_device, in_specs=specs, out_specs=P("data"))
        args = *jax.device_put(rows, split), *jax.device_put(weights, whole)
        got = jax.block_until_ready(value_and_gradient(sharded, args, jax.device_put(dy, split)))
    alone = [
        value_and_gradient(oracle, *as_float32(((*args[:4], *weights), dy_RD)))
        for args, dy_RD in made
    ]
    want = [jnp.stack(z) if i < 3 else sum(z) for i, z in enumerate(zip(*alone, strict=True))]
    assert_near(got, want, 2e-2)


SERVED = Case(jnp.dtype(jnp.bfloat16), (2048, 1024), (1024, 64), 8192, is_narrow=False)


@pytest.mark.parametrize(
    ("kind", "changes", "name"),
    [
        ("NVIDIA H100 80GB HBM3", {}, "pallas_hopper"),
        ("NVIDIA GH200 480GB", {}, "pallas_hopper"),
        ("NVIDIA H200", {"block": (64, 16)}, "pallas_hopper"),
        ("NVIDIA A100-SXM4-80GB", {}, "tiles"),
        ("NVIDIA B200", {}, "tiles"),
        ("AMD Instinct MI300X", {}, "tiles"),
        (None, {}, "tiles"),
        ("NVIDIA H200", {"dtype": jnp.dtype(jnp.float32)}, "tiles"),
        ("NVIDIA H200", {"widths": (2048, 1000)}, "tiles"),
        ("NVIDIA H200", {"block": (16, 8)}, "tiles"),
        ("NVIDIA H200", {"num_rows": 48}, "tiles"),
        ("NVIDIA H200", {"is_narrow": True}, "tiles"),
    ],
)
def test_plain_xla_takes_what_it_cannot_serve(kind, changes, name, monkeypatch):
    monkeypatch.setattr(hopper, "device_kind", lambda: kind)
    case = SERVED._replace(**changes)
    assert grouped_matmul.kernel_of("pallas_hopper", "gpu", case) is KERNELS[name]
    assert grouped_matmul.kernel_of("auto", "gpu", case) is KERNELS["tiles"]


def test_off_a_hopper_gpu_a_config_that_names_it_takes_plain_xla():
    args, dy_RD = make(LAYOUTS["uneven"])
    named, plain = (
        functools.partial(expert_ffn, activation="gelu", block=BLOCK, kernel=kernel)
        for kernel in ("pallas_hopper", "tiles")
    )
    got, want = (value_and_gradient(run, args, dy_RD) for run in (named, plain))
    assert_near(got, want, 0)


def test_sizes_follow_the_load():
    assert [hopper.tile_rows((large, 16), 4096) for large in (32, 256, 511, 512, 1024)] == [
        *(64, 64, 64, 128, 128)
    ]
    assert hopper.tile_rows((1024, 64), 100) == 64
    assert [hopper.unit_rows((1024, small)) for small in (16, 32, 64, 48, 128)] == [
        *(16, 32, 64, 16, 64)
    ]
    assert hopper.padded_rows(KernelSizes(8, (1024, 64), 16_384, 1)) == 8 * 64
