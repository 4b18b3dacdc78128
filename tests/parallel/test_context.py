"""Rows whose tokens are split over `seq`: their order, attention of the tokens of one device, whole
steps against one device, what is refused, and the bytes that a compiled step sends.

Shapes: B rows, S tokens of a row, n devices of `seq`, T = S / n.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from verify_cases import BREAKABLE, references

from moe_jax.errors import UserError
from moe_jax.models import attention_chunks
from moe_jax.models.attention import whole_rows
from moe_jax.models.attention_core import attention, causal, full, of_own, prefix, windowed
from moe_jax.models.attention_layout import Reach
from moe_jax.parallel import context, mesh
from moe_jax.parallel.compiling import QUICK, of_other_platforms
from moe_jax.parallel.mesh import Lengths, P
from moe_jax.plan import dispatch, theory
from moe_jax.plan.compiling import compile_step
from moe_jax.plan.hlo import program as compiled_program
from moe_jax.verify import states
from moe_jax.verify.program import Program
from moe_jax.verify.run import against, evaluated, first_values

S = 48


# The order of a row's tokens.


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_chunks_of_a_device_cost_alike(n):
    chunk = S // (2 * n)
    number_nT = context.places(n, S) // chunk
    assert sorted(context.places(n, S).ravel()) == list(range(S))
    for number_T in number_nT:
        first, second = number_T[0], number_T[-1]
        assert first % 2 == 0 and first + second == 2 * n - 1
        assert set(number_T) == {first, second}


@pytest.mark.parametrize("n", [2, 3, 4])
def test_reordered_is_its_own_inverse_and_what_own_takes(n):
    row_BS = jnp.arange(2 * S).reshape(2, S)
    in_turn_BS = context.reordered(row_BS, n)
    np.testing.assert_array_equal(context.reordered(in_turn_BS, n), row_BS)
    np.testing.assert_array_equal(in_turn_BS[0].reshape(n, -1), context.places(n, S))
    own = jax.vmap(lambda _: context.own(row_BS), axis_name="seq")(jnp.arange(n))
    np.testing.assert_array_equal(np.concatenate(own, axis=1), in_turn_BS)


def test_rows_enter_and_leave():
    row_BS = np.arange(4 * S).reshape(4, S)
    with jax.set_mesh(mesh.make(Lengths(data=2, seq=4))):
        z_BS = jax.device_put(jnp.asarray(row_BS), mesh.sharding("batch", None))
        inside = jax.jit(context.enter)(z_BS)
        assert context.is_split(inside) and not context.is_split(z_BS)
        np.testing.assert_array_equal(inside, row_BS[:, context.places(4, S).ravel()])
        after = jax.jit(context.leave)(inside)
        assert context.is_split(after)
        np.testing.assert_array_equal(after, row_BS)
        np.testing.assert_array_equal(jax.jit(context.whole)(after), row_BS)
        # A row that eight chunks do not divide stays whole on every device: right, and no faster.
        assert not context.is_split(jax.jit(context.enter)(z_BS[:, :12]))


# Attention of the tokens of one device.


@pytest.mark.parametrize("window", [None, 1, 5, 30])
@pytest.mark.parametrize("chunk", [(3, 4), (5, 8), (6, 48)])
@pytest.mark.parametrize("n", [2, 4])
def test_every_device_computes_as_many_pairs_and_all_that_are_seen(n, chunk, window):
    T, num_keys = S // n, -(-S // chunk[1])
    pairs_np2 = attention_chunks.pairs_of_devices(T, num_keys, chunk, Reach(True, window, n))
    computed = []
    for place_T, pairs_p2 in zip(context.places(n, S), pairs_np2, strict=True):
        query_T1, key_1S = place_T[:, None], np.arange(S)[None]
        seen = (key_1S <= query_T1) & (key_1S > query_T1 - (window or S))
        wanted = {(i // chunk[0], j // chunk[1]) for i, j in np.argwhere(seen)}
        listed = [tuple(pair) for pair in pairs_p2.tolist()]
        # Whatever is listed twice is masked entirely.
        assert wanted <= set(listed)
        assert all(listed.count(pair) == 1 for pair in wanted)
        computed.append(len(wanted))
    if window is None and chunk[0] == 3:
        # Chunks that divide what a device has: nothing is filled up.
        assert set(computed) == {pairs_np2.shape[1]}


MASKS = {
    "causal": lambda segment, prefixed: causal(segment),
    "windowed": lambda segment, prefixed: windowed(segment, 7),
    "full": lambda segment, prefixed: full(segment),
    "prefix": prefix,
}


def inputs():
    """Queries, keys, values, segments with padding, which tokens are a prefix, a cotangent."""
    rng = np.random.default_rng(0)
    q, k, v, do = (jnp.asarray(rng.normal(size=(2, S, heads, 4))) for heads in (4, 2, 2, 4))
    segment = np.repeat([[1, 2, 0], [1, 1, 2]], [17, 25, 6], axis=1)
    prefixed = np.arange(S)[None] % 17 < np.array([[5], [9]])
    return (q, k, v), (jnp.asarray(segment, jnp.int32), jnp.asarray(prefixed)), do


def on_devices(mask, n, kernel, qkv, about, do, sink_H):
    """Output and gradients of attention whose queries are split over n devices."""

    def of_device(q_BTHA, k_BTGA, v_BTGA, about, sink_H):
        keys = of_own(MASKS[mask](*about))
        whole = whole_rows(k_BTGA), whole_rows(v_BTGA)
        return attention(q_BTHA, *whole, keys, scale=0.5, sink_H=sink_H, kernel=kernel)

    tokens = P(None, "seq")
    sharded = jax.shard_map(
        of_device, in_specs=(tokens, tokens, tokens, P(), P()), out_specs=tokens
    )

    def run(*qkv):
        split = (jax.sharding.reshard(context.reordered(z, n), tokens) for z in qkv)
        o = sharded(*split, about, sink_H)
        return context.reordered(jax.sharding.reshard(o, P()), n)

    @jax.jit
    def both(qkv, do):
        o, pull = jax.vjp(run, *qkv)
        return o, *pull(do)

    with jax.set_mesh(mesh.make(Lengths(seq=n))):
        return both(qkv, do)


@functools.partial(jax.jit, static_argnums=0)
def on_one(mask, qkv, about, do, sink_H):
    def run(*qkv):
        return attention(*qkv, MASKS[mask](*about), scale=0.5, sink_H=sink_H, kernel="blocks")

    o, pull = jax.vjp(run, *qkv)
    return o, *pull(do)


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_of_split_rows_is_that_of_whole_ones(mask, n, float64, monkeypatch):
    """In chunks that do not divide what a device has; of a CPU, and of accelerators."""
    monkeypatch.setattr(attention_chunks, "CHUNK_ON_CPU", 5)
    monkeypatch.setattr(attention_chunks, "chunk_tokens", lambda num_heads: 4)
    qkv, about, do = inputs()
    sink_H = jnp.linspace(-1, 1, 4)
    want = on_one(mask, qkv, about, do, sink_H)
    got = {"cpu": on_devices(mask, n, "auto", qkv, about, do, sink_H)}
    if mask == "causal":
        got["blocks"] = on_devices(mask, n, "blocks", qkv, about, do, sink_H)
        with of_other_platforms():
            got["others"] = on_devices(mask, n, "auto", qkv, about, do, sink_H)
    for name, arrays in got.items():
        for of, a, b in zip(("o", "q", "k", "v"), arrays, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12, err_msg=f"{name}: {of}")


# Whole steps.


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """Returns changes -> (the reference, a directory with its first state); the load moves a state
    of the router, too.
    """
    return references(tmp_path_factory, BREAKABLE | {"model.moe.router": "sigmoid"})


def assert_equal(one, folder, program):
    """Steps, and the checkpoint of the last one read on one device."""
    end, worst, first = against(one, program, states.read(program, folder / "begin"))
    assert first is None, first
    assert worst["drops"].sound and any(probe.sums["dropped"].any() for probe in one.probes)
    assert not states.unequal(program, end, one.program, folder / str(program.lengths))


def test_a_step_on_four_axes_is_that_of_one_device(float64, one_device):
    one, folder = one_device(())
    program = Program(one.program.raw, Lengths(expert=2, seq=2, model=2)).compile()
    assert_equal(one, folder, program)
    assert evaluated(one, program, states.read(program, folder / "begin")).sound


@pytest.mark.full
@pytest.mark.parametrize(
    "lengths",
    # The model has two key heads.
    [one for seq in (2, 4, 8) for one in mesh.all_of(8, seq=seq) if one.model <= 2],
    ids=str,
)
def test_a_step_on_every_mesh_is_that_of_one_device(lengths, float64, one_device):
    one, folder = one_device(())
    program = Program(one.program.raw, lengths).compile()
    assert_equal(one, folder, program)
    assert first_values(one, program).sound


# Everything that an option changes in how rows are routed, attended to and summed.
OPTIONS = {
    "window, sinks, dropless, accumulated, scan, remat": {
        "model.attention": "sliding_window",
        "model.attentions.sliding_window.window": 5,
        "model.attention_sinks": True,
        "model.moe.dispatcher": "dropless",
        "model.moe.dispatchers.capacity.factor": 1.25,
        "model.moe.router": "null",
        "model.moe.routers.null.kind": "copy",
        "model.moe.shared_experts": 1,
        "model.moe.expert_bias": True,
        "train.micro_batch_size": 8,
        "model.remat": "full",
        "model.scan": True,
        "model.repeats": 2,
        "model.logit_z_loss": 0.01,
    },
    "latent, slots, chunks of logits": {
        "model.attention": "latent",
        "model.num_kv_heads": 4,
        "model.head_dim": 0,
        "model.attentions.latent.kv_lora_rank": 4,
        "model.moe.router": "soft",
        "model.moe.dispatcher": "slots",
        "model.moe.dispatchers.capacity.factor": 1.25,
        "model.loss_chunk": 7,
        "model.attention_cap": 0.5,
        "model.logit_cap": 0.2,
        "model.allow_leak": True,
    },
    "relative bias, scaled head, switch with a bias": {
        "model.attention": "relative_bias",
        "model.attentions.relative_bias.buckets": 6,
        "model.attentions.relative_bias.max_distance": 9,
        "model.head_scale": 0.5,
        "model.moe.router": "switch",
        "model.moe.routers.switch.bias": True,
    },
    "two groups, priority, expert choice, tied": {
        "model.moe.group_rows": 2,
        "model.moe.router": "expert_choice",
        "model.moe.dispatcher": "dropless",
        "model.moe.dispatchers.capacity.factor": 1.25,
        "model.tie_embeddings": True,
        "model.allow_leak": True,
    },
    "dropless in rounds, base": {
        "model.moe.router": "base",
        "model.moe.dispatcher": "dropless",
        "model.moe.dispatchers.capacity.factor": 1.25,
        "model.moe.dispatchers.dropless.buffer": 1.25,
        "model.moe.losses.balance": 0.0,
        "model.allow_leak": True,
    },
}


@pytest.mark.full
@pytest.mark.parametrize("name", OPTIONS)
def test_options_go_with_split_rows(name, float64, one_device):
    one, folder = one_device(tuple(OPTIONS[name].items()))
    program = Program(one.program.raw, Lengths(expert=2, seq=2)).compile()
    end, _, first = against(one, program, states.read(program, folder / "begin"))
    assert first is None, first
    assert not states.unequal(program, end, one.program, folder / "end")


# What is refused.

REFUSED = {
    "data.seq_len (12) must be divisible by 2 x mesh.seq (8)": {"data.seq_len": 12},
    "model.moe.num_experts (6) must be divisible by mesh.expert x mesh.seq (4)": {
        "model.moe.num_experts": 6
    },
    "model.d_model (18) must be divisible by mesh.data x mesh.expert x mesh.seq (4)": {
        "model.d_model": 18
    },
    "which choose among the tokens of whole rows": {"model.period": ("depth:moe",)},
    'mesh.seq (4) must be 1 with model.attention_kernel = "splash"': {
        "model.attention_kernel": "splash"
    },
    'mesh.seq (4) must be 1 with model.attention_kernel = "triton"': {
        "model.attention_kernel": "triton"
    },
    'mesh.seq (4) must be 1 with model.kind = "article"': {"model.kind": "article"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_go_with_split_rows_is_refused(message):
    changes = {"mesh.seq": 4, "model.head_dim": 4, "model.allow_leak": True}
    with pytest.raises(UserError) as caught:
        tiny.build(changes=changes | REFUSED[message], devices=4)
    assert message in str(caught.value)


# What is sent.


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.full)])
def test_a_step_sends_what_theory_says(remat):
    """Keys and values to the byte; of the tokens within 5 %, the rest says where they go."""
    changes = {
        "model.d_model": 512,
        "model.num_heads": 8,
        "model.scan": True,
        "model.remat": remat,
        "model.dtype": "float32",
        "model.param_dtype": "float32",
        "data.seq_len": 32,
        "mesh.seq": 4,
    }
    cfg = tiny.build(changes=changes, devices=4)
    with jax.set_mesh(mesh.make(cfg.mesh)):
        compiled = compile_step(cfg, QUICK).compiled
    found = compiled_program.read(compiled.as_text(), cfg.mesh._asdict()).collectives
    sent = {}
    for one in found:
        sent[one.cargo] = sent.get(one.cargo, 0) + one.num_bytes
    tokens, width, layers = cfg.train.batch_size * 32, 4, 2
    # Two key heads of 64 numbers, keys and values; three of four parts come from others.
    keys = 3 * layers * tokens * 2 * 2 * 64 * width * 3 // 4
    assert sent["keys and values"] == theory.keys_and_values(cfg) == keys
    passes = {"none": 4, "full": 5}[remat]
    rows = passes * layers * tokens * 512 * width * 3 // 4
    assert theory.tokens_over_seq(cfg) == rows
    assert sent["tokens"] == pytest.approx(rows, rel=0.05)
    # Half of a device's tokens change places, forward and back; each token has one loss.
    order = 2 * tokens // 8 * 512 * width + tokens * width * 3 // 4
    assert sent["order of rows"] == pytest.approx(order, rel=0.01)


def test_a_plan_counts_the_rows_of_a_devices_own_experts(float64):
    """Of 16 rows of 2048 tokens with two experts each, a device of two has half the assignments."""
    found = {}
    for seq in (1, 2):
        changes = {"data.seq_len": 2048, "mesh.data": 1, "mesh.seq": seq}
        cfg = tiny.build((1, 1, 1), changes, devices=seq)
        with jax.set_mesh(mesh.make(cfg.mesh)):
            assert dispatch.of_layer(cfg).rows_balanced == 16 * 2048 * 2 // seq
            found[seq], _ = dispatch.rows_computed(cfg, "tpu")
    # Beside them is the padding of tiles.
    assert 0.5 < found[2] / found[1] < 0.55
