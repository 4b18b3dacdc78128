"""Counts equal those of the real model; FLOPs equal the compiler's; the resource card equals what
the compiler allocates.
"""

import contextlib
import io
import math

import card_cases
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from flops_cases import ONE, counted, make_config
from rich.console import Console

from moe_jax import train_step
from moe_jax.moe.dispatch import levels, ragged
from moe_jax.moe.layer import Batch
from moe_jax.parallel import compiling
from moe_jax.parallel.mesh import P
from moe_jax.plan import card as cards
from moe_jax.plan import card_tables, flops, traffic


def dispatcher(name, **options):
    return {"dispatcher": name, "dispatchers": {name: options}}


def dropless(**options):
    others = {"direct": False, "exchange": "auto", "check": False, "slices": 1}
    return dispatcher("dropless", **others, **options)


def top_k(k):
    return {
        "routers": {
            "top_k": {"k": k, "softmax": "before", "renormalize": True, "scale": 1.0, "bias": False}
        }
    }


# Parameters.

MODELS = {
    "default": {},
    "gelu, tied": {"activation": "gelu", "tie_embeddings": True},
    "biases, query-key norm": {
        "attention_bias": True,
        "qk_norm": True,
        "num_kv_heads": 1,
        "head_dim": 6,
    },
    "norms after, of the width, output bias": {
        "attention_bias": True,
        "output_bias": True,
        "qk_norm": True,
        "qk_norm_over": "width",
        "norm_position": "after",
        "head_dim": 6,
    },
    "norms before and after": {"norm_position": "both", "norm_plus_one": True, "logit_cap": 3.0},
    "pattern": {
        "prefix": ("dense", "moe"),
        "period": ("dense", "moe", "moe"),
        "repeats": 2,
        "suffix": ("dense",),
    },
    "scan": {"period": ("dense", "moe"), "repeats": 3, "scan": True},
    "dense only": {"period": ("dense",), "repeats": 2},
    "no repeats": {"prefix": ("moe",), "repeats": 0},
}


SHARED = [
    {},
    {"shared_experts": 2},
    {"shared_experts": 2, "shared_hidden": 12, "shared_gate": True},
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shared", SHARED, ids=["none", "two", "gated"])
def test_parameters_are_those_of_the_model(name, shared):
    cfg = make_config(model=MODELS[name], moe={"num_experts": 8, **shared}).model
    counts, want = flops.parameters(cfg), counted(cfg)
    for kind in set(counts._fields) - {"experts_active"}:
        assert getattr(counts, kind) == want[kind], kind
    assert counts.total == want.total()
    assert counts.total_body == want.total() - want["embedding"] - want["head"]


@pytest.mark.parametrize("k", [1, 3])
def test_active_parameters_are_those_of_a_model_with_only_the_chosen_experts(k):
    """A model that has no more than k experts uses all of them; only its router is narrower."""
    many = flops.parameters(
        make_config(model=MODELS["pattern"], moe={"num_experts": 8, **top_k(k)}).model
    )
    few = counted(make_config(model=MODELS["pattern"], moe={"num_experts": k, **top_k(k)}).model)
    assert many.active - many.router == few.total() - few["router"]
    assert (
        many.active_body - many.router
        == few.total() - few["router"] - few["embedding"] - few["head"]
    )


def test_counts_worked_by_hand():
    """D 4, 2 heads of 2, 1 key-value head, F 3, 5 experts of which 2 are used, V 7, one MoE block,
    SwiGLU, untied.

    attention: q 4x4, k and v 4x2 each, o 4x4 = 48; an expert: gate, up and out of 4x3 = 36; router
    4x5; norms 3x4. FLOPs of a token in a row of 9: 2 per weight; scores: 2 products of width 4 with
    (1 + ... + 9) / 9 = 5 keys = 80.
    """
    sizes = {"d_model": 4, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 7}
    cfg = make_config(model=sizes, moe={"num_experts": 5, "expert_hidden": 3}).model
    counts = flops.parameters(cfg)
    assert counts == flops.Counts(28, 28, 48, 0, 0, 5 * 36, 2 * 36, 20, 12)
    assert (counts.total, counts.active, counts.total_body, counts.active_body) == (
        316,
        208,
        260,
        152,
    )
    forward = flops.forward_per_token(cfg, 9)
    assert forward == flops.Breakdown(2 * 48, 80, 0, 0, 2 * 72, 2 * 20, 2 * 28)
    assert flops.train_per_token(cfg, 9) == 3 * forward.total == 3 * 416


def test_gated_shared_experts_cost_their_width_and_their_gate():
    """Two of width 5 are one of width 10: 3 x 4 x 10 weights, and a gate of 4; 2 FLOPs a weight."""
    sizes = {"d_model": 4, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 7}
    shared = {"shared_experts": 2, "shared_hidden": 5, "shared_gate": True, "num_experts": 5}
    cfg = make_config(model=sizes, moe=shared).model
    assert flops.parameters(cfg).shared == 124
    assert flops.forward_per_token(cfg, 9).shared == 248


# FLOPs, against the compiler's count of a reference model without loops: each token's own experts,
# each query's own keys.

B, S = 2, 4
REFERENCE = {
    "d_model": 96,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 64,
    "ffn_hidden": 160,
    "vocab_size": 128,
    "prefix": ("dense",),
    "qk_norm": True,
    "attention_bias": True,
}
REFERENCE_MOE = {"num_experts": 8, "expert_hidden": 64, "shared_experts": 1}


def norm(x, scale):
    return (
        x
        / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        * scale.reshape((1,) * (x.ndim - 1) + (-1,))
    )


def project(w, x_BSD):
    return [jnp.einsum("BSD,DHA->BSHA", x_BSD, w[name]) for name in "qkv"]


def rotate(x_BSHA):
    half = x_BSHA.shape[-1] // 2
    angle_SA = np.arange(S)[:, None] * 10_000.0 ** (-np.arange(half) / half)[None]
    cos, sin = (jnp.asarray(f(angle_SA), jnp.float32)[None, :, None] for f in (np.cos, np.sin))
    a, b = x_BSHA[..., :half], x_BSHA[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q, k, v):
    """Causal: query i multiplies keys 0 to i and no others. All heads share one key-value head."""
    k, v, out = k[:, :, 0], v[:, :, 0], []
    for i in range(S):
        weight = jax.nn.softmax(jnp.einsum("BHA,BTA->BHT", q[:, i], k[:, : i + 1]) * 64**-0.5)
        out.append(jnp.einsum("BHT,BTA->BHA", weight, v[:, : i + 1]))
    return jnp.stack(out, 1)


def feed_forward(w, x):
    gate, up = (jnp.einsum("...D,DF->...F", x, w["w_in"][:, i]) for i in range(2))
    return jnp.einsum("...F,FD->...D", jax.nn.silu(gate) * up, w["w_out"])


def route(w, x_TD):
    gate_TK, expert_TK = jax.lax.top_k(jax.nn.softmax(x_TD @ w["gate"]), 2)
    return gate_TK / gate_TK.sum(-1, keepdims=True), expert_TK


def experts(w, x_TD, gate_TK, expert_TK):
    """Every token multiplies the gathered weights of its own experts."""
    h_TKPF = jnp.einsum("TD,TKDPF->TKPF", x_TD, w["w_in"][expert_TK])
    hidden = jax.nn.silu(h_TKPF[:, :, 0]) * h_TKPF[:, :, 1] * gate_TK[:, :, None]
    return jnp.einsum("TKF,TKFD->TD", hidden, w["w_out"][expert_TK])


def attention(w, x):
    q, k, v = (y + w[f"{n}_bias"][None, None] for n, y in zip("qkv", project(w, x), strict=True))
    q, k = rotate(norm(q, w["q_norm_scale"])), rotate(norm(k, w["k_norm_scale"]))
    return jnp.einsum("BSHA,HAD->BSD", attend(q, k, v), w["o"])


def block(p, x):
    x = x + attention(p["attention"]["weights"], norm(x, p["norms"]["attention_norm_scale"]))
    h = norm(x, p["norms"]["ffn_norm_scale"])
    y = feed_forward(p["dense"]["weights"], h)
    if "moe" in p:
        h_TD = h.reshape(B * S, -1)
        y = y + experts(p["moe"]["experts"], h_TD, *route(p["moe"]["router"], h_TD)).reshape(
            h.shape
        )
    return x + y


def reference(p, id_BS):
    """The whole model in plain jax.numpy: a dense block and an MoE block with a shared expert."""
    x = p["ends"]["embed"][id_BS] * 96**0.5
    for part in (p["prefix"][0], p["repeats"][0]["blocks"][0]):
        x = block(part, x)
    return norm(x, p["ends"]["norm_scale"]) @ p["ends"]["head"]


def compiled_flops(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"] / (B * S)


@pytest.fixture(scope="module")
def model():
    """(config, parameters) of the reference's sizes; biases and norms are random too."""
    cfg = make_config(model=REFERENCE, moe=REFERENCE_MOE).model
    with jax.set_mesh(meshes.make(*ONE)):
        abstract, _ = jax.eval_shape(train_step.make_model(cfg).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return cfg, jax.tree.map(
        lambda x: rng.normal(size=x.shape, scale=0.1).astype(x.dtype), abstract
    )


def test_reference_is_the_model(model):
    """So that what the compiler counts in the reference is what the model needs."""
    cfg, params = model
    ids = np.random.default_rng(0).integers(0, 128, (B, S)).astype(np.int32)
    with jax.set_mesh(meshes.make(*ONE)):
        position = np.tile(np.arange(S, dtype=np.int32), (B, 1))
        parts = (ids, position, np.ones_like(ids), np.arange(B, dtype=np.int32))
        batch = Batch(*(meshes.put(z, "batch") for z in parts))
        functions = train_step.make_model(cfg)
        place = jax.tree.map(
            lambda x: x.sharding.spec, jax.eval_shape(functions.init, jax.random.key(0))[0]
        )

        def forward(p):
            return functions.bind(jax.sharding.reshard(p, place), {})(
                batch, jax.random.key(0), False
            )[0]

        got = np.asarray(jax.jit(forward)(params))
    want = np.asarray(jax.jit(reference)(params, ids))
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_forward_is_what_the_compiler_counts(model):
    """Each part within 3 %: beside its products a part has a softmax, an activation or a gate,
    which are left out.
    """
    cfg, p = model
    want = flops.forward_per_token(cfg, S)
    dense, moe = p["prefix"][0], p["repeats"][0]["blocks"][0]
    w = dense["attention"]["weights"]
    x_BSD, o_BSHA = jnp.ones((B, S, 96)), jnp.ones((B, S, 2, 64))
    x_TD, choice = x_BSD.reshape(B * S, 96), (jnp.ones((B * S, 2)), jnp.zeros((B * S, 2), int))

    def out(o, w_o):
        return jnp.einsum("BSHA,HAD->BSD", o, w_o)

    parts = {
        "attention_projections": 2
        * (compiled_flops(project, w, x_BSD) + compiled_flops(out, o_BSHA, w["o"])),
        "attention_scores": 2 * compiled_flops(attend, o_BSHA, o_BSHA[:, :, :1], o_BSHA[:, :, :1]),
        "dense": compiled_flops(feed_forward, dense["dense"]["weights"], x_BSD),
        "shared": compiled_flops(feed_forward, moe["dense"]["weights"], x_BSD),
        "experts": compiled_flops(experts, moe["moe"]["experts"], x_TD, *choice),
        "router": compiled_flops(lambda x, w: x @ w, x_TD, moe["moe"]["router"]["gate"]),
        "head": compiled_flops(lambda x, w: x @ w, x_TD, p["ends"]["head"]),
    }
    # It has neither latent experts nor further tokens.
    assert {*parts, "latent", "joins"} == set(want._fields) and want.latent == want.joins == 0
    for name, count in parts.items():
        assert count == pytest.approx(getattr(want, name), rel=0.03), name


def test_training_is_what_the_compiler_counts(model):
    """Forward and backward of the whole model; what is left out (norms, softmaxes, activations) is
    a few percent more.
    """
    cfg, params = model

    def loss(params, ids):
        return jax.nn.logsumexp(reference(params, ids), -1).sum()

    count = compiled_flops(jax.value_and_grad(loss), params, jnp.zeros((B, S), int))
    assert 1 <= count / flops.train_per_token(cfg, S) < 1.06


# The machine's peak.


def test_mfu():
    cfg = make_config().model
    per_token = flops.train_per_token(cfg, 8)
    assert flops.mfu(1000.0, cfg, 8, 4000.0 * per_token) == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"peak = 0\.0 FLOP/s must be positive"):
        flops.mfu(1000.0, cfg, 8, 0.0)


@pytest.mark.parametrize("shape", [None, (2, 1, 1), (2, 2, 2)])
def test_peak_counts_all_devices_at_once(shape, monkeypatch):
    """By a clock that ticks 10 ms a look: the first run takes 10 ms, so the others chain 4
    products, 2.5 ms for each.
    """
    ticks = iter(range(1000))
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(ticks) / 100)
    with jax.set_mesh(meshes.make(*shape)) if shape else contextlib.nullcontext():
        peak = flops.measure_peak("float32")
    assert peak == pytest.approx((math.prod(shape) if shape else 8) * 2 * 512**3 / 0.0025)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_peak_is_a_processor_s(dtype, float64):
    assert 1e8 < flops.measure_peak(dtype) < 1e14


# The card.


def show(card):
    console = Console(file=io.StringIO(), width=80)
    console.print(card_tables.render(card))
    return console.file.getvalue()


@pytest.fixture(scope="module")
def card():
    """Of an MoE block on eight devices, with what it left on them."""
    cfg = make_config((2, 2, 2), moe=dispatcher("capacity", factor=1.5, places=0))
    before = sum(x.nbytes for x in jax.live_arrays())
    with jax.set_mesh(meshes.make(2, 2, 2)):
        card = cards.card(cfg)
    return card, sum(x.nbytes for x in jax.live_arrays()) - before


def test_card_memory_is_what_the_compiler_needs(card):
    """The step's arguments are the state and the batch; it writes the new state over the old."""
    card, allocated = card
    memory, compiled = card.memory, card.compiled
    state_bytes = memory.parameters + memory.optimizer + memory.ema + 8  # and two counters
    batch_bytes = (5 * 16 * 8 + 16) * 4 // 4  # int32; the rows are split over 4 of the 8 devices
    assert state_bytes < compiled.argument <= state_bytes + batch_bytes
    assert compiled.alias == state_bytes
    assert compiled.output > compiled.alias
    assert compiled.temporary > memory.gradients
    assert (
        compiled.peak == compiled.argument + compiled.output - compiled.alias + compiled.temporary
    )
    assert allocated < 1000


def test_card_memory_is_that_of_one_shard(card):
    """Per device: matrices an eighth, the router's gate a quarter (split over data and expert),
    norms whole.
    """
    counts, memory = card[0].parameters, card[0].memory
    assert memory.parameters == 4 * (
        (counts.total - counts.router - counts.norms) / 8 + counts.router / 4 + 96
    )
    assert memory.gradients == memory.ema == memory.parameters
    assert memory.optimizer == memory.parameters + 4  # one momentum, and the count of updates


def test_card_shows_it(card):
    card, _ = card
    assert card.train_per_step == 128 * card.train_per_token == 128 * 3 * card.forward.total
    text = show(card)
    assert "8 x cpu (data 2 x expert 2 x model 2), 0 dense and 1 MoE blocks" in text
    assert "16 rows x 8 tokens = 128 tokens" in text
    for number in (
        card.parameters.total,
        card.parameters.active,
        card.forward.total,
        card.train_per_token,
    ):
        assert f"{number:,}" in text
    for words in (
        "estimate",
        "capacity buffer",
        "over expert",
        card_tables.FLOPS_NOTE,
        card_tables.LAYER_NOTE,
    ):
        assert words in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_card_of_a_dense_model_on_one_device():
    with jax.set_mesh(meshes.make(*ONE)):
        card = cards.card(make_config(model={"period": ("dense",), "tie_embeddings": True}))
    assert card.dispatch is None
    assert card.memory.parameters == 4 * card.parameters.total == 4 * card.parameters.active
    assert card.compiled.alias == 3 * card.memory.parameters + 12
    text = show(card)
    assert "1 x cpu, 1 dense and 0 MoE blocks" in text and "embedding and head" in text
    assert "MoE layer" not in text and "expert" not in text


# One layer's buffers and traffic, without compiling: 8 rows of 8 tokens a micro-batch, so T = 16 on
# each of 4 devices.
# N = k T = 32 assignments, n = 2 devices on the expert axis, e = 4 of 8 experts on each, D = 32, F
# = 16 (8 a shard).


def dispatch_of(monkeypatch, moe, shape=(2, 2, 2)):
    monkeypatch.setattr(cards, "_compiled", lambda cfg, rounds: card_cases.compiled())
    cfg = make_config(shape, moe=moe, train={"micro_batch_size": 8})
    with jax.set_mesh(meshes.make(*shape)):
        return cards.card(cfg)


def test_capacity_buffer_and_traffic(monkeypatch):
    """C = ceil(1.5 x 16 / 8) = 3 places of an expert in a group (a row), 8 experts x 2 groups x 3 =
    48 rows.
    """
    card = dispatch_of(monkeypatch, dispatcher("capacity", factor=1.5, places=0))
    d = card.dispatch
    assert (d.rows_held, d.rows_balanced, d.row_bytes) == (48, 32, 4 * (32 + 32 + 2 * 8))
    assert d.forward == {
        "expert": 48 // 2 * (32 + 1 + 32) * 4,  # half of the rows and gates there, results back
        "data": 4 * (32 * 2 * 8 + 8 * 32) * 4 // 2,  # half of 4 experts' shards of w_in and w_out
        "model": 2 * 16 * 32 * 4 // 2,  # a sum of [T, D] over two devices
    }
    assert d.backward["expert"] == d.forward["expert"] and d.backward["data"] == d.forward["data"]
    assert (
        d.backward["data x expert"] == 2 * 32 * 8 * 4 * 3 // 4
    )  # the gradient of the router's gate [D, E]
    assert "in 2 micro-batches" in show(card) and "the rest drops" in show(card)


def test_dropless_buffer_and_traffic(monkeypatch):
    """Worst: both choices of all n T = 32 tokens are local, 64 rows, and each of 4 experts may
    waste 7 of a block of 8.
    """
    card = dispatch_of(monkeypatch, dropless(buffer=0.0))
    d = card.dispatch
    assert (d.rows_held, d.rows_balanced, d.rows_worst) == (96, 32, 96)
    tokens, choices = (
        16 * 32 * 4,
        32 * (4 + 4 + 4),
    )  # of the other device: x, and (token, expert, gate) of each choice
    assert d.forward["expert"] == tokens + choices + tokens
    assert d.backward["expert"] == tokens + 32 * 4 + tokens
    assert "never too small" in show(card)
    small = dispatch_of(monkeypatch, dropless(buffer=1.0))
    assert (small.dispatch.rows_held, small.dispatch.rows_worst) == (32, 96)
    assert small.dispatch.forward == d.forward
    assert "the rest waits a round" in show(small)


def test_nothing_travels_on_one_device(monkeypatch):
    card = dispatch_of(monkeypatch, {}, ONE)
    assert card.dispatch.forward == card.dispatch.backward == {}
    assert "nothing travels" in show(card)


def test_received_counts_loops_and_the_branch_that_sends_least():
    """Parts of 4 floats on 4 devices: a gather receives 3 parts of 16 bytes, a sum of 4 floats 2 x
    3/4 x 16 bytes.
    """

    def f(x_4):
        def gather(x):
            return jax.lax.all_gather(x, "data", tiled=True).sum()

        total = jax.lax.scan(
            lambda sum, _: (sum + gather(x_4), None), jnp.zeros_like(x_4, shape=()), length=5
        )[0]
        return (
            jax.lax.cond(x_4[0] > 0, lambda x: gather(x), lambda x: gather(x) + gather(x), x_4)
            + total
        )

    def g(x_4):
        return jax.lax.psum(x_4, "data")

    mesh = meshes.make(4, 1, 1)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=jax.NamedSharding(mesh, P("data")))

        def trace(f, out):
            return jax.make_jaxpr(jax.shard_map(f, in_specs=P("data"), out_specs=out))(x).jaxpr

        lengths = dict(mesh.shape)
        assert traffic.received(trace(lambda x: f(x)[None], P("data")), lengths) == {
            "data": (5 + 1) * 3 * 16
        }
        assert traffic.received(trace(g, P()), lengths) == {"data": 2 * 16 * 3 // 4}


@pytest.mark.parametrize(("platform", "rows"), [("cpu", 3 * 8), ("tpu", 2 * 3 * 8 // 4)])
def test_received_counts_the_way_of_the_platform(monkeypatch, platform, rows):
    """A ragged exchange of 8 rows of 2 floats between 4 devices: there are 3/4 of them from others,
    there and back; a CPU gathers all rows.
    """
    monkeypatch.setattr(compiling, "_platform_of_mesh", lambda: platform)
    level = levels.split(4, 1)[1]
    zero_S = jnp.zeros(4, jnp.int32)
    journey = ragged.Journey(ragged.Slices(*[zero_S] * 3), ragged.Slices(*[zero_S] * 3))

    def f(x_82):
        there = ragged.exchange(x_82, journey, 16, level)
        return there if platform == "cpu" else ragged.exchange(there, journey.reversed(), 8, level)

    with jax.set_mesh(meshes.make(1, 4, 1)):
        place = jax.NamedSharding(jax.sharding.get_mesh(), P("expert"))
        x = jax.ShapeDtypeStruct((32, 2), jnp.float32, sharding=place)
        traced = jax.make_jaxpr(jax.shard_map(f, in_specs=P("expert"), out_specs=P("expert")))(x)
        found = traffic.received(traced.jaxpr, dict(jax.sharding.get_mesh().shape))
    # The twin asks for offsets beside.
    assert 0 <= found["expert"] - rows * 2 * 4 <= 2 * 4 * 4
