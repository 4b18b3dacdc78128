"""Orderings by hand, and with a dispatcher that drops against the oracle, in the oracle's own
order, on meshes.
"""

import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import oracle
import pytest
from router_cases import compiled

from moe_jax.moe import load
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.dispatch.contract import Experts
from moe_jax.moe.dispatch.layout import Shape
from moe_jax.moe.experts.grouped_matmul import expert_ffn
from moe_jax.moe.ordering import ORDERINGS, rounding
from moe_jax.moe.routing.contract import Routing
from moe_jax.parallel.mesh import BATCH, P, spec


def apply(
    name,
    expert_index_TK,
    gate_TK,
    *,
    num_experts,
    group_tokens,
    num_rows=1,
    train=True,
    listed=None,
    **options,
):
    """The ordering of a token-choice routing; `listed`: its entries in another order, as a list
    without per_token.
    """
    expert_index_TK, gate_TK = (
        np.asarray(expert_index_TK, np.int32),
        np.asarray(gate_TK, np.float64),
    )
    num_tokens, k = expert_index_TK.shape
    entries = (
        np.repeat(np.arange(num_tokens, dtype=np.int32), k),
        expert_index_TK.reshape(-1),
        gate_TK.reshape(-1),
    )
    entries = entries if listed is None else tuple(z[listed] for z in entries)
    per_token = k if listed is None else 0

    def run(token_N, expert_index_N, gate_N):
        sums = {"tokens": jnp.full(num_rows, num_tokens / num_rows)}
        routing = Routing(token_N, expert_index_N, gate_N, sums, per_token)
        sizes = {"num_experts": num_experts, "num_tokens": num_tokens, "group_tokens": group_tokens}
        return ORDERINGS[name].apply(
            routing, **sizes, train=train, options=ORDERINGS[name].options(**options)
        )

    return compiled(run)(*entries)


EXPERTS = [[0, 1], [1, 0], [0, 2], [2, 1]]
GATES = [[0.5, 0.3], [0.6, 0.1], [0.9, 0.8], [0.6, 0.2]]
SIZES = {"num_experts": 3, "group_tokens": 4}


def test_k_major_by_hand(float64):
    """Entries 0 2 4 6 are the first choices of the four tokens, 1 3 5 7 the second ones."""
    assert apply("k_major", EXPERTS, GATES, **SIZES).order_N.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    # The same entries expert by expert: an entry's choice is how many entries of its token come
    # before it.
    listed = [0, 3, 4, 1, 2, 7, 5, 6]  # tokens 0 1 2 0 1 3 2 3
    order = apply("k_major", EXPERTS, GATES, **SIZES, listed=np.array(listed)).order_N.tolist()
    assert [listed[i] for i in order] == [0, 3, 4, 7, 1, 2, 5, 6]


def test_batch_priority_by_hand(float64):
    """Largest gates 0.5, 0.6, 0.9, 0.6: tokens 2, 1, 3 (a tie: by place), 0; first choices before
    second ones.
    """
    tokens = [2, 1, 3, 0]
    want = [2 * t for t in tokens] + [2 * t + 1 for t in tokens]
    assert apply("batch_priority", EXPERTS, GATES, **SIZES).order_N.tolist() == want


ROUNDED = [[0], [0], [0], [0], [0], [1], [1], [1], [2], [3]]


@pytest.mark.parametrize(
    ("tile", "gone", "padding"),
    [
        (1, [], 0),
        (
            4,
            [0, 8],
            1,
        ),  # 5 -> 4: the smallest gate of expert 0 goes; 3 -> 4: one row of padding; 1 -> 0
        (2, [], 3),  # halves are rounded up: 5 -> 6, 3 -> 4, 1 -> 2
        (16, list(range(9)), 0),  # all are below half a tile
    ],
)
def test_rounding_by_hand(float64, tile, gone, padding):
    """Three experts with 5, 3 and 1 assignments, and one assignment (expert 3 of 3) that goes
    nowhere.
    """
    gates = [[0.1], [0.3], [0.2], [0.5], [0.4], [0.9], [0.1], [0.5], [0.7], [0.0]]
    got = apply("rounding", ROUNDED, gates, num_experts=3, group_tokens=10, tile=tile)
    assert [i for i in range(9) if got.expert_index_N[i] == 3] == gone and got.expert_index_N[
        9
    ] == 3
    assert (got.gate_N == 0).tolist() == [i in gone or i == 9 for i in range(10)]
    sums = {name: float(got.sums[name][0]) for name in ("dropped", "padding", "served")}
    assert sums == {"dropped": len(gone), "padding": padding, "served": 9 - len(gone)}
    assert (sums["padding"] + sums["served"]) % tile == 0


def test_rounding_is_per_group_and_of_training_alone(float64):
    """Four rows in two groups of 4 tokens:

    3 -> 4 of expert 0 in the first, 1 -> 0 of each in the second; tile 4.
    """
    experts, gates = [[0], [0], [0], [2], [0], [1], [2], [2]], [[0.5]] * 8
    sizes = {"num_experts": 2, "group_tokens": 4, "num_rows": 4, "tile": 4}
    got = apply("rounding", experts, gates, **sizes)
    assert got.expert_index_N.tolist() == [0, 0, 0, 2, 2, 2, 2, 2]
    assert got.sums["padding"].tolist() == [1, 0, 0, 0] and got.sums["dropped"].tolist() == [
        0,
        0,
        2,
        0,
    ]
    assert got.sums["served"].tolist() == [2, 1, 0, 0]
    kept = apply("rounding", experts, gates, **sizes, train=False)
    assert kept.expert_index_N.tolist() == [e for (e,) in experts] and "padding" not in kept.sums
    # The same as a list in no order: equal gates are dropped from its end.
    tie = apply(
        "rounding",
        [[0]] * 5,
        [[0.5]] * 5,
        num_experts=2,
        group_tokens=5,
        tile=4,
        listed=np.array([4, 2, 0, 1, 3]),
    )
    assert tie.expert_index_N.tolist() == [0, 0, 0, 0, 2]


def test_rounding_is_the_same_on_a_mesh(float64):
    """Four devices with two rows each, a group, against one device with all eight: experts, gates
    and the sums of each row.
    """
    rng, sizes = np.random.default_rng(0), {"num_experts": 4, "group_tokens": 32}
    expert, gate = rng.integers(0, 5, (8, 16, 1)).astype(np.int32), rng.random((8, 16, 1))

    def run(expert, gate):
        num_rows, num_tokens = len(expert), expert.size
        sums = {"tokens": (expert < 4).sum((1, 2)).astype(gate.dtype)}
        token_N = jnp.arange(num_tokens, dtype=jnp.int32)
        routing = Routing(
            token_N, expert.reshape(-1), jnp.where(expert < 4, gate, 0).reshape(-1), sums, 1
        )
        got = ORDERINGS["rounding"].apply(
            routing, **sizes, num_tokens=num_tokens, train=True, options=rounding.Options(tile=4)
        )
        return got.expert_index_N.reshape(num_rows, -1), got.gate_N.reshape(num_rows, -1), got.sums

    want = jax.device_get(compiled(run)(expert, gate))
    with jax.set_mesh(meshes.make(2, 2, 2)):
        over = jax.shard_map(run, in_specs=P(BATCH), out_specs=P(BATCH))
        got = jax.device_get(compiled(over)(*(meshes.put(z, "batch") for z in (expert, gate))))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert want[2]["dropped"].sum() > 0 and want[2]["padding"].sum() > 0


def test_padding_is_reported_where_rows_are_rounded():
    totals = {
        name: jnp.ones(1) for name in ("tokens", "z", "entropy", "gate", "gate_max", "dropped")
    }
    totals |= {"counts": jnp.array([[8.0, 4.0]])}
    assert "padding_fraction" not in load.metrics(totals)
    rounded = totals | {"padding": jnp.array([4.0]), "served": jnp.array([12.0])}
    assert float(load.metrics(rounded)["padding_fraction"][0]) == 0.25


# Capacity

B, S, D, F, E, K, GROUP_ROWS, FACTOR = 8, 4, 16, 16, 8, 2, 2, 0.75
ORDERED = ("token_major", "k_major", "batch_priority")


def in_order(name, gate_TK):
    """All (t, j) by falling priority, over all groups at once."""
    num_tokens, k = gate_TK.shape
    tokens = list(range(num_tokens))
    if name == "token_major":
        return [(t, j) for t in tokens for j in range(k)]
    if name == "batch_priority":
        tokens.sort(key=lambda t: (-gate_TK[t].max(), t))
    return [(t, j) for j in range(k) for t in tokens]


def on_device(x, expert, gate, w_in, w_out, *, name):
    b, s, d = x.shape
    w_in, w_out = (
        jax.lax.all_gather(w, "data", axis=axis, tiled=True) for w, axis in ((w_in, 1), (w_out, 2))
    )
    sizes = {"num_experts": E, "num_tokens": b * s, "group_tokens": GROUP_ROWS * s}
    token_N = jnp.repeat(jnp.arange(b * s, dtype=jnp.int32), K)
    routing = Routing(token_N, expert.reshape(-1), gate.reshape(-1), {}, per_token=K)
    routing = ORDERINGS[name].apply(routing, **sizes, train=True, options=ORDERINGS[name].options())
    shape = Shape(
        **sizes,
        num_assignments=b * s * K,
        num_intended=b * s * K,
        per_token=K,
        expert_axis=jax.lax.axis_size("expert"),
    )

    def grouped(x, g, start, size, block):
        return expert_ffn(x, g, start, size, w_in, w_out, activation="swiglu", block=block)

    options = DISPATCHERS["capacity"].options(factor=FACTOR)
    y, dropped = DISPATCHERS["capacity"].apply(
        x.reshape(-1, d), routing, Experts(grouped), shape=shape, options=options
    )
    return jax.lax.psum(y, ("model", "seq")).reshape(x.shape), dropped.reshape(expert.shape)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 4, 1)], ids=meshes.name)
def test_capacity_serves_in_order(float64, shape):
    """The tokens that drop, the output and the gradient of the gates, against the oracle; each
    order drops others.
    """
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, B, S, D))
    w_in, w_out = rng.normal(size=(E, D, 2, F)) / 4, rng.normal(size=(E, F, D)) / 4
    expert = np.argsort(rng.random((B, S, E)) + 0.2 * np.arange(E), -1)[..., :K].astype(np.int32)
    expert[3, 2:] = E  # padding
    gate = np.where(expert < E, -np.sort(-rng.random((B, S, K))), 0)
    row, weights = (
        P(BATCH),
        (
            spec("experts", "expert_embed", None, "hidden"),
            spec("experts", "hidden", "expert_embed"),
        ),
    )

    def flat(z):
        return np.asarray(z).reshape(B * S, *z.shape[2:])

    valid = flat(expert)[:, 0] < E

    def run(x, expert, gate, w_in, w_out, dy):
        result = {}
        for name in ORDERED:
            body = functools.partial(on_device, name=name)
            layer = jax.shard_map(body, in_specs=(row, row, row, *weights), out_specs=(row, row))

            def loss(gate, layer=layer):
                y, dropped = layer(x, expert, gate, w_in, w_out)
                return (y * dy).sum(), (y, dropped)

            result[name] = jax.grad(loss, has_aux=True)(gate)
        return result

    with jax.set_mesh(meshes.make(*shape)):
        placed = (
            *(meshes.put(z, "batch") for z in (x, expert, gate)),
            meshes.put(w_in, "experts", "expert_embed", None, "hidden"),
            meshes.put(w_out, "experts", "hidden", "expert_embed"),
            meshes.put(dy, "batch"),
        )
        got = jax.device_get(compiled(run)(*placed))
    lost = {}
    for name, (dgate, (y, dropped)) in got.items():
        order = in_order(name, flat(gate))
        kept = oracle.served(flat(expert), valid, E, GROUP_ROWS * S, FACTOR, order)
        assignments = [(t, flat(expert)[t, j], flat(gate)[t, j]) for t, j in kept]
        want_y, _, want_dgate, _, _ = oracle.experts(flat(x), assignments, w_in, w_out, flat(dy))
        lost[name] = {(t, j) for t in np.flatnonzero(valid).tolist() for j in range(K)} - set(kept)
        assert {tuple(pair) for pair in np.argwhere(flat(dropped)).tolist()} == lost[name], name
        np.testing.assert_allclose(flat(y), want_y, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(
            [flat(dgate)[pair] for pair in kept], want_dgate, atol=1e-10, err_msg=name
        )
    assert len({frozenset(pairs) for pairs in lost.values()}) == 3, (
        "the orders drop the same tokens: nothing is tested"
    )
