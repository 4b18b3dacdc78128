"""The experts' kernels against all experts on all rows, on every layout a dispatcher can make, on
one and 8 devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_cases import all_experts, assert_near, value_and_gradient
from jax.sharding import PartitionSpec as P

from moe_jax.moe.activations import ACTIVATIONS
from moe_jax.moe.experts import grouped_matmul, pallas_tpu, tiles
from moe_jax.moe.experts.blocks import block_sizes
from moe_jax.moe.experts.gathers import sum_rows, take_rows
from moe_jax.moe.experts.grouped_matmul import KERNELS, expert_ffn
from moe_jax.moe.experts.network import Chosen, KernelSizes, Layout
from moe_jax.parallel.varying import vary_alike
from moe_jax.schema.config import MoEConfig

# As a TPU has it, but interpreted.
INTERPRETED = grouped_matmul._of_products(functools.partial(pallas_tpu.products, interpret=True))
DECLARED = tuple(KERNELS)
TESTED = ["blocks", "tiles", "ragged_dot", "interpreted"]
D, F = 6, 5
BLOCK = (8, 2)

# (start, size) per expert: every layout has its own trouble. One shape for all, so that one
# compilation serves all.
NUM_ROWS = 40
LAYOUTS = {
    "balanced": ([0, 8, 16, 24, 32], [8, 8, 8, 8, 8]),
    "uneven": (
        [0, 4, 24, 26, 40],
        [3, 19, 1, 13, 0],
    ),  # blocks reach past an expert's rows into the next one's
    "empty experts": ([0, 0, 10, 10, 10], [0, 9, 0, 0, 7]),
    "all on one": ([0, 0, 32, 32, 32], [0, 31, 0, 0, 0]),
    "nobody": ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    "gaps": (
        [2, 14, 26, 30, 36],
        [7, 1, 2, 4, 1],
    ),  # as capacity slots: rooms apart, a void beginning and end
    "full to the end": ([0, 2, 2, 2, 2], [2, 0, 0, 0, 38]),  # no room for a block to reach past R
    "one expert": ([0], [37]),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setitem(KERNELS, "interpreted", INTERPRETED)


def make(layout, activation="swiglu", dtype=np.float64, seed=0):
    """Arguments of expert_ffn and a cotangent; rows in nobody's range hold finite garbage."""
    start, size = layout
    e, num_rows, parts = len(start), NUM_ROWS, ACTIVATIONS[activation].parts
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    x_RD, gate_R = draw(num_rows, D), draw(num_rows)
    void_R = ~np.any(owner(layout), axis=0)
    x_RD = jnp.where(void_R[:, None], 1e3, x_RD)
    placed = jnp.asarray(start, jnp.int32), jnp.asarray(size, jnp.int32)
    return (x_RD, gate_R, *placed, draw(e, D, parts, F), draw(e, F, D)), draw(num_rows, D)


def owner(layout):
    """[e, R]: is the row the expert's?"""
    start, size = (np.asarray(z) for z in layout)
    row_R = np.arange(NUM_ROWS)
    return (row_R >= start[:, None]) & (row_R < (start + size)[:, None])


@functools.cache  # one function per choice, so that tests share compilations
def own(kernel="blocks", activation="swiglu", block=BLOCK):
    return functools.partial(expert_ffn, activation=activation, block=block, kernel=kernel)


@functools.cache
def oracle(activation="swiglu"):
    return functools.partial(all_experts, activation=activation)


@pytest.mark.parametrize("kernel", TESTED)
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_all_experts_on_every_layout(name, kernel, float64):
    args, dy_RD = make(LAYOUTS[name])
    got = value_and_gradient(own(kernel), args, dy_RD)
    assert_near(got, value_and_gradient(oracle(), args, dy_RD), 1e-12)
    void_R = ~np.any(owner(LAYOUTS[name]), axis=0)
    for array in got[:3]:
        assert not np.any(
            np.asarray(array)[void_R]
        )  # y, dx and dgate are exactly zero in nobody's rows


def test_a_tile_of_a_large_expert_is_a_round(monkeypatch, float64):
    """The rounds are those of experts as large as Mixtral's; the experts are as above."""
    assert tiles.tiles_of_round(1024, 3 * 4096 * 14_336) == 1
    assert tiles.tiles_of_round(1024, 3 * 2048 * 1024) == tiles.ROUND
    monkeypatch.setattr(tiles, "ENOUGH", 1)
    one_tile_a_round = functools.partial(
        expert_ffn, activation="swiglu", block=BLOCK, kernel="tiles"
    )
    for name in ("uneven", "full to the end", "nobody"):
        args, dy_RD = make(LAYOUTS[name])
        got = value_and_gradient(one_tile_a_round, args, dy_RD)
        assert_near(got, value_and_gradient(oracle(), args, dy_RD), 1e-12)


@pytest.mark.parametrize("kernel", TESTED)
@pytest.mark.parametrize(
    ("activation", "block"),
    [("swiglu", (2, 2)), ("swiglu", (32, 2)), ("gelu", (8, 2)), ("gelu", (4, 2))],
)
def test_every_activation_and_ladder_of_blocks(activation, block, kernel, float64):
    args, dy_RD = make(LAYOUTS["uneven"], activation)
    got = value_and_gradient(own(kernel, activation, block), args, dy_RD)
    assert_near(got, value_and_gradient(oracle(activation), args, dy_RD), 1e-12)


@pytest.mark.parametrize("kernel", TESTED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 3e-6), (jnp.bfloat16, 3e-2)])
def test_narrow_dtypes_stay_near_and_keep_their_dtype(dtype, tolerance, kernel):
    args, dy_RD = make(LAYOUTS["uneven"], dtype=dtype)
    with jax.numpy_dtype_promotion("strict"):
        got = value_and_gradient(own(kernel), args, dy_RD)
    assert [a.dtype for a in got] == [dtype] * 5
    wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == dtype else a, (args, dy_RD))
    assert_near(got, value_and_gradient(oracle(), *wide), tolerance)


def test_a_weight_gradient_is_accumulated_and_returned_wider_than_the_rows():
    """bfloat16 rows of ones, float32 weights:

    300 rows of gradient 1 cannot be counted in bfloat16 (256 + 1 = 256).
    """
    num_rows = 304
    x_RD, gate_R = jnp.ones((num_rows, 1), jnp.bfloat16), jnp.ones((num_rows,), jnp.float32)
    w_in, w_out = (
        jnp.full((1, 1, 1, 1), 8.0),
        jnp.ones((1, 1, 1)),
    )  # gelu(8) = 8 exactly: d w_out = 8 per row
    args = (x_RD, gate_R, jnp.zeros((1,), jnp.int32), jnp.full((1,), 300, jnp.int32), w_in, w_out)
    ffn = own(activation="gelu", block=(8, 8))
    y_RD, _, dgate_R, _, dw_out = value_and_gradient(
        ffn, args, jnp.ones((num_rows, 1), jnp.bfloat16)
    )
    assert (y_RD.dtype, dgate_R.dtype, dw_out.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    assert float(dw_out[0, 0, 0]) == 2400.0


def test_no_expert_pays_for_another(float64):
    """NaN in weights of an expert without rows reaches nothing but their own (zero) gradient."""
    args, dy_RD = make(LAYOUTS["empty experts"])
    poisoned = args[:4] + tuple(w.at[0].set(jnp.nan) for w in args[4:])
    assert_near(
        value_and_gradient(own(), poisoned, dy_RD), value_and_gradient(own(), args, dy_RD), 0
    )


def test_rows_of_nobody_may_be_left_undefined(float64, monkeypatch):
    """As on accelerators, where a kernel need not write them."""

    def spoiled(layout, block):
        right = grouped_matmul.ragged.products(layout, block)
        is_own = grouped_matmul.whole.is_own(layout, NUM_ROWS)

        def spoil(product):
            return lambda a, w: jnp.where(is_own, product(a, w), jnp.nan)

        return right._replace(product=spoil(right.product), transposed=spoil(right.transposed))

    monkeypatch.setitem(KERNELS, "spoiled", grouped_matmul._of_products(spoiled))
    args, dy_RD = make(LAYOUTS["gaps"])
    got = value_and_gradient(own("spoiled"), args, dy_RD)
    assert_near(got, value_and_gradient(oracle(), args, dy_RD), 1e-12)


def test_inside_checkpoint_and_scan(float64):
    args, dy_RD = make(LAYOUTS["uneven"])

    def layers(f, x, gate, start, size, w_in, w_out):
        body = jax.checkpoint(
            lambda x, scale: (x + f(x, gate, start, size, w_in * scale, w_out), None)
        )
        return jax.lax.scan(body, x, jnp.array([1.0, 0.5]))[0]

    got, want = (
        value_and_gradient(functools.partial(layers, f), args, dy_RD) for f in (own(), oracle())
    )
    assert_near(got, want, 1e-11)


def sharded_case():
    """A layout per (data, expert) shard, each over its own two of four experts."""
    names = ["uneven", "empty experts", "balanced", "all on one"]
    shards = [(start[:2], size[:2]) for start, size in (LAYOUTS[name] for name in names)]
    made = [make(shard, seed=i) for i, shard in enumerate(shards)]
    rows = [jnp.stack([m[0][i] for m in made]) for i in range(4)]
    rng = np.random.default_rng(9)
    w_in, w_out = (
        jnp.asarray(rng.normal(size=(4, D, 2, 4))),
        jnp.asarray(rng.normal(size=(4, 4, D))),
    )
    return (*rows, w_in, w_out), jnp.stack([m[1] for m in made])


@pytest.mark.parametrize("kernel", ["blocks", "tiles", "ragged_dot"])
def test_on_a_mesh_equals_one_device(kernel, float64):
    """Rows vary over data and expert, weights over expert and model: each gradient is summed over
    the right axes.
    """
    args, dy = sharded_case()
    mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "model"))
    rows, w_in_spec, w_out_spec = (
        P(("data", "expert")),
        P("expert", None, None, "model"),
        P("expert", "model"),
    )

    def on_device(x, gate, start, size, w_in, w_out):
        y_RD = own(kernel)(x[0], gate[0], start[0], size[0], w_in, w_out)
        return jax.lax.psum(y_RD, "model")[None]

    in_specs = (rows, rows, rows, rows, w_in_spec, w_out_spec)
    parallel = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=rows)

    def one_device(x, gate, start, size, w_in, w_out):
        rows = [[z[i] for z in (x, gate, start, size)] for i in range(4)]
        return jnp.stack(
            [oracle()(*z, *(w[i % 2 * 2 :][:2] for w in (w_in, w_out))) for i, z in enumerate(rows)]
        )

    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, s) for a, s in zip(args, in_specs)]
        got = value_and_gradient(parallel, placed, jax.device_put(dy, rows))
    assert_near(got, value_and_gradient(one_device, args, dy), 1e-12)


def test_the_kernel_is_chosen_by_the_platform_compiled_for():
    args, _ = make(LAYOUTS["balanced"], dtype=np.float32)

    def total(*args):
        return expert_ffn(*args, activation="swiglu", block=BLOCK).sum()

    # The value too: without it a newer jax leaves out the second product, whose result nobody asks
    # for.
    traced = jax.jit(jax.value_and_grad(total, (0, 4, 5))).trace(*args)
    text = {
        p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu", "cuda", "rocm")
    }
    for platform in ("cpu", "cuda", "rocm"):
        assert "tpu_custom_call" not in text[platform] and "while" in text[platform]
    # Two products forward; backward four more.
    assert text["tpu"].count("tpu_custom_call") == 6 and "while" not in text["tpu"]
    # Only the CPU's kernel visits experts in an order of its own.
    assert "stablehlo.sort" in text["cpu"] and "stablehlo.sort" not in text["cuda"]
    assert not any("ragged_dot" in z for z in text.values())


def test_the_config_names_every_kernel():
    fields = {field.name: field for field in dataclasses.fields(MoEConfig)}
    declared = fields["expert_kernel"].metadata["option"]
    assert declared.choices == (grouped_matmul.BY_PLATFORM, *DECLARED)
    assert declared.default == grouped_matmul.BY_PLATFORM


@pytest.mark.parametrize("num_experts", [1, 8, 128])
def test_work_is_flat_in_the_number_of_experts(num_experts):
    """Products per useful row, with the padding that is stated: less than a tile an expert, and a
    round.
    """
    rng = np.random.default_rng(num_experts)
    num_rows = 4096
    size_e = rng.multinomial(num_rows, rng.dirichlet(np.ones(num_experts))).astype(np.int32)
    layout = Layout(jnp.asarray(np.cumsum(size_e) - size_e), jnp.asarray(size_e))
    B = tiles.tile_rows(block_sizes(num_rows / num_experts), num_rows)
    list_tiles = functools.partial(tiles.list_tiles, num_rows=num_rows, B=B, per_round=tiles.ROUND)
    listed = jax.jit(list_tiles)(layout)
    rounds = -(-int(listed.num_tiles) // tiles.ROUND)
    assert rounds * tiles.ROUND <= len(listed.expert_V)
    assert num_rows <= int(listed.num_tiles) * B < num_rows + num_experts * B
    rows = np.concatenate([np.arange(a, b) for a, b in zip(listed.first_V, listed.end_V) if a < b])
    np.testing.assert_array_equal(rows, np.arange(num_rows))
    rows = pallas_tpu.tile_rows(block_sizes(num_rows / num_experts), num_rows)
    for empty in (False, True):
        list_visits = functools.partial(
            pallas_tpu.list_visits, num_rows=num_rows, rows=rows, empty=empty
        )
        visits, number = jax.jit(list_visits)(layout)
        assert num_rows // rows <= int(number) <= num_rows // rows + num_experts
        assert int(number) <= len(visits.expert_V)


@pytest.mark.parametrize(
    ("kernel", "mean", "num_weights"),
    [
        ("tiles", 1000, 3 * 2048 * 1024),
        ("tiles", 8000, 3 * 2048 * 1024),
        ("tiles", 8000, 3 * 4096 * 14_336),
        ("pallas_tpu", 1000, 3 * 2048 * 1024),
    ],
    ids=["tiles", "large loads", "large experts", "pallas_tpu"],
)
def test_padding_of_random_loads_is_what_plans_say(kernel, mean, num_weights):
    """The rows that are computed beyond those that experts have, mean of 40 loads within 15 %."""
    num_experts = 8
    block = block_sizes(mean)
    num_rows = 16 * mean
    of_kernel = {"tiles": tiles, "pallas_tpu": pallas_tpu}[kernel]
    B = of_kernel.tile_rows(block, num_rows)
    per_round = tiles.tiles_of_round(B, num_weights)

    @jax.jit
    def computed(size_e):
        room_e = -(-size_e // block[1]) * block[1]
        layout = Layout(jnp.cumsum(room_e) - room_e, size_e)
        if kernel == "pallas_tpu":
            return B * pallas_tpu.list_visits(layout, num_rows, B, empty=False)[1]
        rounds = -(-tiles.list_tiles(layout, num_rows, B, per_round).num_tiles // per_round)
        return B * per_round * rounds

    rng = np.random.default_rng(0)
    loads = rng.multinomial(num_experts * mean, rng.dirichlet(np.full(num_experts, 9.0), 40))
    found = [int(computed(jnp.asarray(size_e, jnp.int32))) - num_experts * mean for size_e in loads]
    told = KERNELS[kernel].padded_rows(KernelSizes(num_experts, block, num_rows, num_weights))
    assert np.mean(found) == pytest.approx(told, rel=0.15)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("name", ["auto", *KERNELS])
def test_a_plan_knows_the_kernel_of_a_platform(name, platform, monkeypatch):
    """`_run` leaves the choice to the compiler: here the branches are named."""

    def branches(*args, others, **own):
        return own.get(platform, others)

    monkeypatch.setattr(grouped_matmul, "by_platform", branches)
    for key, kernel in KERNELS.items():
        monkeypatch.setitem(KERNELS, key, kernel._replace(forward=lambda *args, key=key: key))
    grouped_matmul._bound.cache_clear()
    rows = grouped_matmul.Rows(jnp.zeros((2, 2)), None, None, jnp.zeros((1, 2, 2)))
    run = grouped_matmul._run(name, "forward", Chosen("gelu"), (8, 8), rows)
    taken = run() if callable(run) else run
    case = grouped_matmul._case(rows, (8, 8))
    expected = grouped_matmul.kernel_of(name, platform, case)
    grouped_matmul._bound.cache_clear()
    assert expected is KERNELS[taken]


def test_memory_is_flat_in_the_number_of_experts():
    """Beside the weights and their gradients there is nothing that grows with E."""

    def temporary(num_experts):
        R, D, F = 512, 32, 64
        shapes = ((R, D), (R,), (num_experts, D, 2, F), (num_experts, F, D))
        x, gate, w_in, w_out = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
        index = jax.ShapeDtypeStruct((num_experts,), jnp.int32)

        def forward(*args):
            return expert_ffn(*args, activation="swiglu", block=(64, 16), kernel="tiles")

        compiled = jax.jit(forward).lower(x, gate, index, index, w_in, w_out).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary(8), temporary(64)
    assert many < 1.2 * few + 64 * 1024


def test_varying_alike_costs_nothing():
    args, _ = make(LAYOUTS["balanced"], dtype=np.float32)
    text = (
        jax.jit(lambda x, w: vary_alike(x, w)[1] @ jnp.ones((D, 2)))
        .lower(args[0], args[5])
        .compile()
        .as_text()
    )
    assert " add(" not in text


def test_refuses_what_cannot_be_laid_out():
    args, _ = make(LAYOUTS["balanced"], dtype=np.float32)
    with pytest.raises(ValueError, match=r"block \(8, 5\) must divide evenly"):
        expert_ffn(*args, activation="swiglu", block=(8, 5))
    with pytest.raises(ValueError, match="small size must divide R = 40"):
        expert_ffn(*args, activation="swiglu", block=(32, 16))
    with pytest.raises(
        ValueError, match=r"gelu needs w_in_eDPF with P = 1, got shape \(5, 6, 2, 5\)"
    ):
        expert_ffn(*args, activation="gelu", block=BLOCK)


def test_block_sizes_divide_and_follow_the_load():
    for rows_mean in (0.1, 1, 7, 16, 33, 64, 100, 512, 5000):
        large, small = block_sizes(rows_mean)
        assert large % small == 0 and large <= max(8, 1.5 * rows_mean) and small <= 64
    assert [block_sizes(mean) for mean in (1024, 512, 64, 16)] == [
        (1024, 64),
        (512, 32),
        (64, 16),
        (16, 8),
    ]


def test_activations_are_jax_nn():
    """The dense layers use the same functions, so that a comparison with them is one."""
    pre = jnp.linspace(-3, 3, 8).reshape(2, 4)
    swiglu, gelu = (Chosen(name).function() for name in ("swiglu", "gelu"))
    np.testing.assert_array_equal(swiglu(pre), jax.nn.silu(pre[:, :2]) * pre[:, 2:])
    np.testing.assert_array_equal(gelu(pre), jax.nn.gelu(pre))


# Gathers: T = 4 tokens, K = 2, R = 8. Token 1 has one row, token 3 none, rows 3, 6, 7 are nobody's.
SRC_R = np.array([0, 2, 1, 4, 0, 2, 4, 4])
DEST_TK = np.array([[0, 4], [8, 2], [1, 5], [8, 8]])


@pytest.mark.parametrize("fixed", [True, False])
def test_take_and_sum_are_transposes_of_each_other(fixed, float64):
    pick_RT = (SRC_R[:, None] == np.arange(4)).astype(np.float64)
    dest_TK = jnp.asarray(DEST_TK) if fixed else None
    rng = np.random.default_rng(0)
    x_TD, y_RD = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.normal(size=(8, 3)))
    taken, pull_taken = jax.vjp(lambda x: take_rows(x, jnp.asarray(SRC_R), dest_TK), x_TD)
    summed, pull_summed = jax.vjp(lambda y: sum_rows(y, dest_TK, jnp.asarray(SRC_R), 4), y_RD)
    for got, want in [
        (taken, pick_RT @ x_TD),
        (pull_taken(y_RD)[0], pick_RT.T @ y_RD),
        (summed, pick_RT.T @ y_RD),
        (pull_summed(x_TD)[0], pick_RT @ x_TD),
    ]:
        np.testing.assert_allclose(got, want, atol=1e-14)


def test_a_fixed_number_of_choices_needs_no_scatter():
    both = jax.grad(
        lambda x: jnp.sum(
            sum_rows(
                take_rows(x, jnp.asarray(SRC_R), jnp.asarray(DEST_TK)),
                jnp.asarray(DEST_TK),
                jnp.asarray(SRC_R),
                4,
            )
            ** 2
        )
    )
    assert "scatter" not in str(jax.make_jaxpr(both)(jnp.ones((4, 3))))


def test_sums_of_bfloat16_are_rounded_once():
    """1 + 1/256 + 1/256 is 1 + 1/128 in bfloat16, but 1 if every partial sum is rounded."""
    y_RD = jnp.array([[1.0], [1 / 256], [1 / 256]], jnp.bfloat16)
    summed = sum_rows(y_RD, jnp.array([[0, 1, 2]]), jnp.zeros((3,), jnp.int32), 1)
    assert float(summed[0, 0]) == 1 + 1 / 128


@pytest.mark.parametrize("fixed", [True, False])
def test_gathers_on_a_mesh_equal_one_device(fixed, float64):
    """Tokens invariant over model, cotangents varying over it, indices varying over data only."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    rng = np.random.default_rng(0)
    x, scale = jnp.asarray(rng.normal(size=(8, 3))), jnp.asarray(rng.normal(size=(2,)))
    src, dest = jnp.asarray(np.tile(SRC_R, 2)), jnp.asarray(np.tile(DEST_TK, (2, 1)))

    def device(x_TD, src_R, dest_TK, scale_1):
        dest_TK = dest_TK if fixed else None
        rows_RD = jnp.sin(take_rows(x_TD, src_R, dest_TK) * scale_1[:, None])
        return jax.lax.psum(sum_rows(rows_RD, dest_TK, src_R, 4), "model")

    specs = (P("data"), P("data"), P("data"), P("model"))
    sharded = jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=P("data"))

    def alone(x, src, dest, scale):
        pick_RT = jnp.asarray((SRC_R[:, None] == np.arange(4)).astype(np.float64))

        def half(x):
            return sum(pick_RT.T @ jnp.sin(pick_RT @ x * s) for s in scale)

        return jnp.concatenate([half(x[:4]), half(x[4:])])

    def energy(f, *args):
        return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(f(*args) ** 2)))(*args)

    want = energy(alone, x, src, dest, scale)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, s) for a, s in zip((x, src, dest, scale), specs)]
        got = energy(sharded, *placed)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_a_buffer_smaller_than_the_large_block():
    """Three experts of 16 rows in blocks of (64, 16): no block of 64 fits into the 48 rows."""
    rng = np.random.default_rng(0)
    x, gate = rng.normal(size=(48, 4)).astype(np.float32), np.ones(48, np.float32)
    w_in, w_out = (
        rng.normal(size=(3, 4, 1, 8)).astype(np.float32),
        rng.normal(size=(3, 8, 4)).astype(np.float32),
    )
    start, size = np.array([0, 16, 32], np.int32), np.array([16, 16, 16], np.int32)
    arrays = [jnp.asarray(z) for z in (x, gate, start, size, w_in, w_out)]
    y = expert_ffn(*arrays, activation="gelu", block=(64, 16))
    want = jnp.einsum(
        "erf,efd->erd",
        jax.nn.gelu(jnp.einsum("erd,edf->erf", x.reshape(3, 16, 4), w_in[:, :, 0])),
        w_out,
    )
    np.testing.assert_allclose(y, want.reshape(48, 4), atol=1e-4)
