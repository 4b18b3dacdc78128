"""Routers that assign over many tokens, or without scores: hand-worked cases and meshes, each
alone, in float64.
"""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from router_cases import compiled

from moe_jax.errors import UserError
from moe_jax.moe import load, losses
from moe_jax.moe.routing import ROUTERS, hash
from moe_jax.moe.routing.contract import RouterCfg, Routing, Tokens
from moe_jax.parallel.mesh import BATCH, P


def options(router, changes):
    return ROUTERS[router].options(**changes)


def route(router, x_TD, params, *, num_experts, valid_T=None, num_rows=1, group_rows=1, **rest):
    """`rest`: train, id_T, state, recorded, total; all else are options of the router."""
    x_TD = jnp.asarray(x_TD)
    zero = jnp.zeros(len(x_TD), jnp.int32)
    valid_T = jnp.ones(len(x_TD), bool) if valid_T is None else jnp.asarray(valid_T)
    train, total = rest.pop("train", True), rest.pop("total", lambda z: z)
    id_T, state, recorded = rest.pop("id_T", zero), rest.pop("state", {}), rest.pop("recorded", ())
    tokens = Tokens(x_TD, jnp.asarray(id_T), zero, zero, zero, valid_T, num_rows, recorded)
    cfg = RouterCfg(num_experts, options(router, rest), group_rows, vocab_size=64, total=total)
    params = jax.tree.map(jnp.asarray, params)
    return ROUTERS[router].route(params, state, tokens, cfg=cfg, rng=jax.random.key(0), train=train)


def from_logits(router, router_logits_TE, **rest):
    """The router on tokens whose logits are given: x is the logits, W the identity."""
    router_logits_TE = np.asarray(router_logits_TE, float)
    num = router_logits_TE.shape[1]
    given = {name: rest.pop(name) for name in ("state", "recorded") if name in rest}
    run = compiled(
        lambda x, w, given: route(router, x, {"gate": w}, num_experts=num, **rest, **given)
    )
    return run(router_logits_TE, np.eye(num), given)


def chosen(routing, num_experts):
    """{(token, expert): gate} of the assignments that go somewhere."""
    entries = zip(
        *map(np.asarray, (routing.token_N, routing.expert_index_N, routing.gate_N)),
        strict=True,
    )
    return {(int(t), int(e)): float(g) for t, e, g in entries if e < num_experts}


# Expert choice

SCORES = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])


def close(got, want):
    assert got.keys() == want.keys()
    np.testing.assert_allclose([got[key] for key in want], list(want.values()), atol=1e-12)


def test_expert_choice_by_hand(float64):
    """C = 1 * 4 / 2 = 2: expert 0 takes its best tokens 0 and 1, expert 1 takes 3 and then 2; the
    gates are the probabilities.
    """
    got = from_logits("expert_choice", np.log(SCORES), factor=1.0)
    close(chosen(got, 2), {(0, 0): 0.9, (1, 0): 0.8, (3, 1): 0.6, (2, 1): 0.3})
    assert got.sums["counts"].tolist() == [[2, 2]] and got.sums["gate"].tolist() == pytest.approx(
        [2.6]
    )
    # ceil(1.5 * 4 / 2) = 3: token 2 is taken twice, so it has two experts
    close(
        chosen(from_logits("expert_choice", np.log(SCORES), factor=1.5), 2),
        {(0, 0): 0.9, (1, 0): 0.8, (2, 0): 0.7, (3, 1): 0.6, (2, 1): 0.3, (1, 1): 0.2},
    )


def test_expert_choice_stays_within_groups(float64):
    """Two groups of two tokens, C = 1: each expert takes one token of each; as one group of two
    rows it is the case above.
    """
    got = from_logits("expert_choice", np.log(SCORES), factor=1.0, num_rows=2)
    close(chosen(got, 2), {(0, 0): 0.9, (1, 1): 0.2, (2, 0): 0.7, (3, 1): 0.6})
    assert got.sums["counts"].tolist() == [[1, 1], [1, 1]]
    whole = from_logits("expert_choice", np.log(SCORES), factor=1.0, num_rows=2, group_rows=2)
    assert chosen(whole, 2).keys() == {(0, 0), (1, 0), (3, 1), (2, 1)}
    assert whole.sums["counts"].tolist() == [[2, 0], [0, 2]]


def test_padding_never_takes_a_place_of_expert_choice(float64):
    """Token 0 is padding: token 2 moves up.

    With one valid token both experts take it, and their other places stay empty.
    """
    first = from_logits(
        "expert_choice", np.log(SCORES), factor=1.0, valid_T=[False, True, True, True]
    )
    assert chosen(first, 2).keys() == {(1, 0), (2, 0), (3, 1), (2, 1)}
    alone = from_logits(
        "expert_choice", np.log(SCORES), factor=1.0, valid_T=[False, False, True, False]
    )
    close(chosen(alone, 2), {(2, 0): 0.7, (2, 1): 0.3})
    assert (np.asarray(alone.gate_N)[np.asarray(alone.expert_index_N) == 2] == 0).all()


# Hash


@pytest.mark.parametrize(
    ("vocab", "num", "k"), [(64, 8, 1), (64, 8, 2), (67, 8, 3), (1000, 6, 4), (5, 8, 2), (50, 4, 4)]
)
def test_hash_table_is_balanced_and_distinct(vocab, num, k):
    table = hash.hash_table(vocab, num, k, 0)
    assert table.shape == (vocab, k) and all(len(set(row)) == k for row in table.tolist())
    counts = np.bincount(table.reshape(-1), minlength=num)
    assert counts.max() - counts.min() <= 1 and counts.sum() == vocab * k
    again, other = hash.hash_table.__wrapped__(vocab, num, k, 0), hash.hash_table(vocab, num, k, 1)
    assert (again == table).all() and (k == num or (other != table).any())


def test_hash_sends_a_token_by_its_id_alone(float64):
    rng = np.random.default_rng(0)
    id_T = np.array([5, 9, 5, 63], np.int32)
    run = compiled(lambda x: route("hash", x, {}, num_experts=8, id_T=id_T, k=2))
    got = [run(rng.normal(size=(4, 3))) for _ in range(2)]
    assert (
        got[0].expert_index_N.tolist()
        == got[1].expert_index_N.tolist()
        == hash.hash_table(64, 8, 2, 0)[id_T].reshape(-1).tolist()
    )
    assert got[0].gate_N.tolist() == [0.5] * 8


# BASE


def test_base_by_hand(float64):
    """Both tokens like expert 0 better; sigmoid(2 + d) + sigmoid(1 + d) = 1 at d = b_0 - b_1 =
    -1.5, so token 1 goes to expert 1.
    """
    logits = np.array([[2.0, 0.0], [1.0, 0.0]])

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    close(chosen(from_logits("base", logits), 2), {(0, 0): sigmoid(2), (1, 1): 0.5})
    close(
        chosen(from_logits("base", logits, gates="softmax"), 2),
        {(0, 0): sigmoid(2), (1, 1): sigmoid(-1)},
    )
    close(
        chosen(from_logits("base", logits, train=False), 2),
        {(0, 0): sigmoid(2), (1, 0): sigmoid(1)},
    )


def test_base_balances_each_group_or_the_batch(float64):
    """Two rows of two tokens, of which the second likes expert 0 more: alone each gives it one
    token, together the second gives both.
    """
    logits = [[2.0, 0.0], [1.0, 0.0], [4.0, 0.0], [3.0, 0.0]]

    def by(**rest):
        return from_logits("base", logits, num_rows=2, **rest).expert_index_N.tolist()

    assert by() == [0, 1, 0, 1]
    assert by(group_rows=2) == by(scope="batch") == [1, 1, 0, 0]


def plan(logits, iterations):
    """diag(u) exp(logits) diag(v) with columns of n / E and rows of 1, by the textbook's two
    divisions.
    """
    kernel, v = np.exp(logits), np.ones(logits.shape[1])
    for _ in range(iterations):
        u = 1 / (kernel @ v)
        v = len(logits) / logits.shape[1] / (kernel.T @ u)
    return u[:, None] * kernel * v


def test_base_takes_the_largest_entries_of_the_transport_plan(float64):
    logits = np.random.default_rng(0).normal(size=(48, 6)) + np.arange(
        6
    )  # greedily, most tokens take the last experts
    want = np.argsort(-plan(logits, 20), 1)[:, :2]
    got = from_logits("base", logits, k=2, iterations=20)
    assert got.expert_index_N.reshape(48, 2).tolist() == want.tolist()
    greedy = from_logits("base", logits, k=2, train=False)

    def spread(routing):
        return float(np.ptp(np.asarray(routing.sums["counts"])))

    assert spread(got) < spread(greedy) / 3


def test_base_ignores_padding_and_survives_extreme_scores(float64):
    logits = np.random.default_rng(0).normal(size=(12, 4))
    valid = np.arange(12) % 3 > 0
    want = from_logits("base", logits[valid], k=1).expert_index_N
    loud = np.where(valid[:, None], logits, 1e3 * np.arange(4))
    assert (from_logits("base", loud, k=1, valid_T=valid).expert_index_N[valid] == want).all()
    far = from_logits("base", 1e4 * logits, k=1, iterations=30, gates="softmax")
    assert np.isfinite(far.gate_N).all() and (np.asarray(far.expert_index_N) < 4).all()
    nobody = from_logits("base", logits, k=1, valid_T=np.zeros(12, bool))
    assert (nobody.expert_index_N == 4).all()


# ReLU


def test_relu_by_hand(float64):
    """Token 0 has three active experts of which the two largest are served; token 1 none; token 2
    one.
    """
    logits = [[1.0, -1.0, 0.5, 2.0], [-1.0, -2.0, -0.5, 0.0], [-1.0, 3.0, -1.0, -1.0]]
    got = from_logits("relu", logits, max_active=2, k=2, state={"l1": jnp.asarray(0.5)})
    assert got.expert_index_N.tolist() == [3, 0, 4, 4, 1, 4] and got.gate_N.tolist() == [
        2,
        1,
        0,
        0,
        3,
        0,
    ]
    sums = {name: value[0].tolist() for name, value in got.sums.items()}
    assert (
        sums["counts"] == [1, 1, 1, 1] and sums["dropped"] == 1 and sums["probs"] == [1, 3, 0.5, 2]
    )
    assert sums["l1_weight"] == 0.5 * 3 and sums["gate"] == 6 and sums["gate_max"] == 5


def test_relu_loss_by_hand(float64):
    """R = (2, 0), (1, 3):

    P = (1.5, 1.5); two and one tokens active, so with E / k = 2 f = (2, 1): 1.5 * 3 = 4.5. Plain:
    3.
    """
    value = {}
    for balanced in (True, False):

        def make(gate, balanced=balanced):
            return load.totals(
                {
                    name: z[None]
                    for name, z in route(
                        "relu",
                        [[2.0, -1.0], [1.0, 3.0]],
                        {"gate": gate},
                        num_experts=2,
                        k=1,
                        max_active=2,
                        balanced=balanced,
                        state={"l1": jnp.asarray(0.1)},
                    ).sums.items()
                }
            )

        def auxiliary(gate, make=make):
            totals = make(gate)
            loss, parts = losses.auxiliary(totals, {"z": 0.0})
            return loss, (parts["l1"], load.metrics({**totals, "dropped": jnp.zeros(1)}))

        (loss, (l1, metrics)), slope = compiled(jax.value_and_grad(auxiliary, has_aux=True))(
            np.eye(2)
        )
        value[balanced] = (float(loss), float(l1))
        # d loss / d R_te = 0.1 f_e / 2, where active; d R / d W is x
        f = np.array([2.0, 1.0]) if balanced else np.ones(2)
        np.testing.assert_allclose(slope, 0.05 * f * np.array([[2 + 1, 1], [-1 + 3, 3]]))
        assert float(metrics["l1"][0]) == 0.1 and float(metrics["active"][0]) == 1.5
    np.testing.assert_allclose(value[True], [0.45, 4.5])
    np.testing.assert_allclose(value[False], [0.3, 3.0])


def test_relu_coefficient_by_hand(float64):
    """10 tokens, k = 2:

    21 active is too many, 19 too few, 20 right; and it never falls below its first value.
    """
    cfg = RouterCfg(4, options("relu", {"k": 2, "alpha": 1.25, "l1": 1.0}), 1, 64, lambda z: z)

    def update(counts):
        return ROUTERS["relu"].update(
            {"l1": jnp.asarray(8.0)}, {"counts": jnp.asarray(counts), "tokens": 10.0}, cfg
        )

    assert [float(update([n, 5.0, 5.0, 5.0])["l1"]) for n in (6.0, 4.0, 5.0)] == [10.0, 6.4, 8.0]
    first = {"l1": jnp.asarray(1.0)}
    few = {"counts": jnp.asarray([4.0, 5.0, 5.0, 5.0]), "tokens": 10.0}
    assert float(ROUTERS["relu"].update(first, few, cfg)["l1"]) == 1.0


def test_relu_layers_share_a_coefficient(float64):
    """20 assignments are meant. One layer has five too many, the other one too few: their mean is
    too many, so both grow; a layer that has its own coefficient takes its own branch.
    """
    counts = {"counts": jnp.array([[10.0, 5, 5, 5], [4.0, 5, 5, 5]]), "tokens": jnp.full(2, 10.0)}

    def update(shared):
        own = options("relu", {"k": 2, "alpha": 1.25, "l1": 1.0, "shared": shared})
        cfg = RouterCfg(4, own, 1, 64, lambda z: z, lambda z: jax.lax.pmean(z, "layers"))
        new = jax.vmap(
            lambda state, totals: ROUTERS["relu"].update(state, totals, cfg), axis_name="layers"
        )({"l1": jnp.full(2, 8.0)}, counts)
        return new["l1"].tolist()

    assert update(True) == [10.0, 10.0]
    assert update(False) == [10.0, 6.4]


# Replay


def test_recorded_by_hand(float64):
    """Logits log(1, 2, 3, 4): over experts 3 and 1 the router gives 4 / 6 and 2 / 6; over expert 2
    and nowhere, 1 and 0.
    """
    logits = np.log([[1.0, 2.0, 3.0, 4.0]] * 3)
    recorded = (
        jnp.array([[3, 1], [2, 4], [4, 4]]),
        jnp.array([[0.7, 0.1], [0.4, 0.9], [0.5, 0.5]]),
    )
    got = from_logits("recorded", logits, recorded=recorded)
    close(chosen(got, 4), {(0, 3): 0.7, (0, 1): 0.1, (1, 2): 0.4})
    assert got.sums["counts"].tolist() == [[0, 1, 1, 1]] and got.expert_index_N.tolist() == [
        3,
        1,
        2,
        4,
        4,
        4,
    ]
    close(
        chosen(from_logits("recorded", logits, recorded=recorded, gates="router"), 4),
        {(0, 3): 4 / 6, (0, 1): 2 / 6, (1, 2): 1.0},
    )

    def gate(w):
        return route(
            "recorded", logits, {"gate": w}, num_experts=4, recorded=recorded, gates="router"
        ).gate_N[0]

    slope = compiled(jax.grad(gate))(np.eye(4))
    np.testing.assert_allclose(
        slope, np.outer(logits[0], [0, -2 / 9, 0, 2 / 9]), atol=1e-12
    )  # p (1 - p) with p = 2 / 3


def test_a_batch_without_a_recording_is_refused(float64):
    with pytest.raises(UserError, match='"recorded" replays a recording, and this batch has none'):
        from_logits("recorded", np.zeros((2, 4)))
    recorded = (jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3)))
    with pytest.raises(
        UserError, match=r"recorded.k \(2\) must be the number of choices in the recording \(3\)"
    ):
        from_logits("recorded", np.zeros((2, 4)), recorded=recorded)


# Soft MoE


def soft_weights(x_GtD, phi, scale, valid_Gt):
    """(dispatch, combine) of the paper by loops: softmax over the valid tokens of a group, and over
    all slots.
    """
    if scale is not None:
        x_GtD = x_GtD / np.linalg.norm(x_GtD, axis=-1, keepdims=True)
        phi = scale * phi / np.linalg.norm(phi, axis=0)
    dispatch, combine = np.zeros((2, *x_GtD.shape[:2], *phi.shape[1:]))
    for g, x_tD in enumerate(x_GtD):
        logits = np.exp(np.einsum("td,des->tes", x_tD, phi)) * valid_Gt[g][:, None, None]
        if valid_Gt[g].any():
            dispatch[g] = logits / logits.sum(0)
            combine[g] = logits / np.maximum(logits.sum((1, 2), keepdims=True), 1e-300)
    return dispatch, combine


@pytest.mark.parametrize("normalize", [True, False])
def test_soft_mixtures_are_those_of_the_paper(float64, normalize):
    rng = np.random.default_rng(0)
    x, phi, valid = rng.normal(size=(3, 8, 5)), rng.normal(size=(5, 4, 2)), rng.random((3, 8)) < 0.7
    valid[1] = False
    params = {"phi": phi} | ({"scale": 1.7} if normalize else {})

    def run(x):
        return route(
            "soft",
            x,
            params,
            num_experts=4,
            num_rows=6,
            group_rows=2,
            valid_T=valid.reshape(-1),
            normalize=normalize,
        )

    got = compiled(run)(x.reshape(24, 5))
    dispatch, combine = soft_weights(x, phi, 1.7 if normalize else None, valid)
    np.testing.assert_allclose(got.dispatch_GtEp, dispatch, atol=1e-12)
    np.testing.assert_allclose(got.combine_GtEp, combine, atol=1e-12)
    np.testing.assert_allclose(got.sums["importance"].sum(0), combine.sum((0, 1, 3)), atol=1e-12)
    zero = compiled(
        jax.grad(lambda x: run(x).dispatch_GtEp[0, 0, 0, 0] + run(x).combine_GtEp[0].sum())
    )(np.zeros((24, 5)))
    assert np.isfinite(zero).all(), "a token of zeros has no direction, and must have a gradient"


# Meshes


def test_selections_over_tokens_are_the_same_on_meshes(float64):
    """Groups of two rows, and Sinkhorn over the whole batch: bit-equal assignments on one device
    and on four shards of the batch.
    """
    rng = np.random.default_rng(0)
    rows, length, num = 8, 6, 4
    x, valid = rng.normal(size=(rows, length, 5)), rng.random((rows, length)) < 0.8
    w = {"gate": rng.normal(size=(5, num)) + np.arange(num)}
    cases = {
        "expert_choice": ("expert_choice", {}),
        "base": ("base", {"k": 2}),
        "batch": ("base", {"scope": "batch"}),
        "relu": ("relu", {"state": {"l1": jnp.ones(())}}),
    }

    def on_device(x, valid):
        b, result = x.shape[0], {}
        for case, (router, changes) in cases.items():
            flat, total = (x.reshape(-1, 5), valid.reshape(-1)), lambda z: jax.lax.psum(z, BATCH)
            rest = {"num_rows": b, "group_rows": 2, "total": total, "valid_T": flat[1], **changes}
            got = route(router, flat[0], w, num_experts=num, **rest)
            gates = (
                jnp.zeros((b * length, num))
                .at[got.token_N, got.expert_index_N]
                .add(got.gate_N, mode="drop")
            )
            result[case] = (gates.reshape(b, length, num), got.sums)
        return result

    def run(shape):
        with jax.set_mesh(meshes.make(*shape)):
            layer = jax.jit(jax.shard_map(on_device, in_specs=P(BATCH), out_specs=P(BATCH)))
            return jax.device_get(layer(meshes.put(x, "batch"), meshes.put(valid, "batch")))

    one, many = run((1, 1, 1)), run((2, 2, 2))
    for case, (gates, sums) in one.items():
        assert ((gates > 0) == (many[case][0] > 0)).all(), case
        for a, b in zip(jax.tree.leaves((gates, sums)), jax.tree.leaves(many[case]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12, err_msg=case)
    assert (one["base"][0] != one["batch"][0]).any()


def test_every_router_here_returns_what_the_layer_takes(float64):
    for router in ("expert_choice", "base", "relu"):
        got = from_logits(router, np.eye(4), state={"l1": jnp.asarray(1.0)})
        assert (
            isinstance(got, Routing) and got.token_N.dtype == got.expert_index_N.dtype == jnp.int32
        )
