"""Routers other than top-k: hand-worked cases, what each paper promises, the same on every mesh,
and the updates of their states.
"""

import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import tiny
from jax.test_util import check_grads
from scipy.stats import norm

from moe_jax.moe import load, losses
from moe_jax.moe.routing import ROUTERS, quantile
from moe_jax.moe.routing.contract import RouterCfg, Sizes, Tokens
from moe_jax.parallel.mesh import BATCH, P

LOGITS = np.log([[4.0, 3.0, 2.0, 1.0]])  # probabilities .4 .3 .2 .1


def options(name, **changes):
    return ROUTERS[name].options(**changes)


def make_tokens(x_TD, num_rows=1, valid_T=None, row_b=None, id_T=None):
    num = len(x_TD)
    length = num // num_rows
    row_b = jnp.arange(num_rows) if row_b is None else jnp.asarray(row_b)
    valid_T = jnp.ones(num, bool) if valid_T is None else jnp.asarray(valid_T)
    place_T = jnp.arange(num) % length
    ids = jnp.zeros(num, jnp.int32) if id_T is None else jnp.asarray(id_T)
    return Tokens(
        jnp.asarray(x_TD),
        ids,
        place_T,
        jnp.repeat(row_b, length),
        valid_T.astype(jnp.int32),
        valid_T,
        num_rows,
    )


@functools.cache  # one small program each: a dozen times as quick as its operations one by one
def program(name, num_experts, train, num_rows, own):
    cfg = RouterCfg(num_experts, own, group_rows=1, vocab_size=64, total=lambda z: z)

    def run(params, state, arrays, key):
        tokens = Tokens(*arrays, num_rows)
        routing = ROUTERS[name].route(
            params, state, tokens, cfg=cfg, rng=jax.random.key(key), train=train
        )
        return routing._replace(per_token=None, sums=dict(routing.sums))

    return jax.jit(run)


def route(
    name, x_TD, params=None, state=None, num_experts=4, train=False, key=0, placed=None, **changes
):
    """A routing alone; `placed`: the arguments of make_tokens."""
    own = options(name, **changes)
    tokens = make_tokens(x_TD, **(placed or {}))
    run = program(name, num_experts, train, tokens.num_rows, own)
    routing = run(as_arrays(params), as_arrays(state), tokens[:6], key)
    return routing._replace(per_token=getattr(own, "k", 1))


def as_arrays(weights):
    return {name: jnp.asarray(w) for name, w in (weights or {}).items()}


def first_weights(name, d_model=6, num_experts=8, **changes):
    """Parameters and state as a model starts with, but no matrix of zeros."""
    sizes, own = Sizes(d_model, num_experts, 64), options(name, **changes)
    rng = np.random.default_rng(0)

    def fill(w):
        return jnp.asarray(
            rng.normal(size=w.shape) * 0.7 if w.constant == 0 else np.full(w.shape, w.constant)
        )

    return {n: fill(w) for n, w in ROUTERS[name].params(sizes, own).items()}, {
        n: fill(w) for n, w in ROUTERS[name].state(sizes, own).items()
    }


def test_switch_gate_is_the_probability_itself(float64):
    got = route("switch", np.eye(1), {"gate": LOGITS}, jitter=0.5)
    assert got.expert_index_N.tolist() == [0]
    np.testing.assert_allclose(got.gate_N, [0.4])


def test_switch_jitter_is_bounded_and_in_training_only(float64):
    """With one input and the logits x' (1, 0), the logit of the gate is x' itself: within 1 +- 0.1,
    with that spread, and mean 1.
    """
    x, gate = np.ones((4000, 1)), {"gate": np.array([[1.0, 0.0]])}
    gates = np.asarray(route("switch", x, gate, num_experts=2, train=True, jitter=0.1).gate_N)
    factor = np.log(gates / (1 - gates))
    assert 0.9 <= factor.min() < 0.901 and 1.099 < factor.max() <= 1.1
    assert abs(factor.mean() - 1) < 4 * 0.1 / np.sqrt(3 * 4000)
    assert np.ptp(route("switch", x, gate, num_experts=2, train=False, jitter=0.1).gate_N) == 0


@pytest.mark.parametrize("name", ["switch", "noisy_top_k"])
def test_noise_belongs_to_the_row_not_to_its_place_in_the_batch(float64, name):
    x, (params, state) = np.random.default_rng(1).normal(size=(12, 6)), first_weights(name)
    whole = route(name, x, params, state, 8, True, placed={"num_rows": 3, "row_b": [5, 2, 7]})
    alone = route(name, x[4:8], params, state, 8, True, placed={"row_b": [2]})
    k = whole.per_token
    np.testing.assert_array_equal(whole.gate_N[4 * k : 8 * k], alone.gate_N)
    other = route(name, x[4:8], params, state, 8, True, placed={"row_b": [3]})
    assert (other.gate_N != alone.gate_N).any()


def test_noisy_top_k_by_hand(float64):
    """Logits (1, 0), k = 1, no noise drawn: the other's logit is each one's threshold; sigma =
    softplus(0) + 0.01 = log 2 + 0.01.
    """
    params = {"gate": np.array([[1.0, 0.0]]), "noise": np.zeros((1, 2))}
    got, sigma = route("noisy_top_k", np.eye(1), params, num_experts=2, k=1), np.log(2) + 0.01
    np.testing.assert_allclose(got.sums["load"], [[norm.cdf(1 / sigma), norm.cdf(-1 / sigma)]])
    np.testing.assert_allclose(got.gate_N, [1.0])
    np.testing.assert_allclose(
        route("noisy_top_k", np.eye(1), params, num_experts=2).gate_N, np.exp([1, 0]) / (np.e + 1)
    )


def test_smooth_load_is_the_expected_count(float64):
    """By the tower rule the mean of P_e over the noise is the chance that e is chosen; 8 experts,
    8000 draws of one token.
    """
    x, params = (
        np.ones((8000, 1)),
        {"gate": np.linspace(-1, 1, 8)[None], "noise": np.linspace(1, -1, 8)[None]},
    )
    sums = route("noisy_top_k", x, params, num_experts=8, train=True, k=3).sums
    assert np.abs(sums["load"] - sums["counts"]).max() < 4 * np.sqrt(8000) * 0.5
    assert np.ptp(sums["counts"]) > 1000


def test_load_has_a_gradient_for_both_matrices_and_none_of_padding(float64):
    x, (params, _) = np.random.default_rng(1).normal(size=(10, 6)), first_weights("noisy_top_k")
    valid, weight = np.arange(10) < 7, np.random.default_rng(2).normal(size=8)

    def load(params, x=x, **changes):
        got = route("noisy_top_k", x, params, None, 8, True, placed={"valid_T": valid}, **changes)
        return (got.sums["load"][0] * weight).sum()

    check_grads(load, (params,), order=1, modes="rev", atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(load(params), load(params, np.where(valid[:, None], x, 9.0)))
    all_chosen = jax.grad(lambda p: load(p, k=8))(params)
    assert all((np.asarray(g) == 0).all() for g in all_chosen.values())


def test_sigmoid_by_hand(float64):
    """Affinities .8 .6 .5 .3, bias (0, 0, 0, .4): chosen are .8 and .3 + .4; gates without the
    bias.
    """
    s = np.array([[0.8, 0.6, 0.5, 0.3]])
    gate, bias = {"gate": np.log(s / (1 - s))}, {"bias": np.array([0, 0, 0, 0.4])}
    got = route("sigmoid", np.eye(1), gate, bias, scale=2.5)
    assert got.expert_index_N.tolist() == [0, 3]
    np.testing.assert_allclose(got.gate_N, [2.5 * 0.8 / 1.1, 2.5 * 0.3 / 1.1])
    np.testing.assert_allclose(
        route("sigmoid", np.eye(1), gate, bias, renormalize=False).gate_N, [0.8, 0.3]
    )
    np.testing.assert_allclose(got.sums["probs"], s / 2.2)


def test_groups_by_hand(float64):
    """Groups (.5 .4) and (.6 .1): two largest .9 against .7, the largest .5 against .6.

    DeepSeek-V2's softmax keeps the order.
    """
    s = np.array([[0.5, 0.4, 0.6, 0.1]])
    gate, zero = {"gate": np.log(s / (1 - s))}, {"bias": np.zeros(4)}
    groups = {"num_groups": 2, "top_groups": 1}
    assert route("sigmoid", np.eye(1), gate, zero, **groups).expert_index_N.tolist() == [0, 1]
    assert route(
        "sigmoid", np.eye(1), gate, zero, **groups, group_score="max"
    ).expert_index_N.tolist() == [2, 3]
    v2 = {"score": "softmax", "renormalize": False, "group_score": "max"}
    np.testing.assert_allclose(
        route("sigmoid", np.eye(1), {"gate": np.log(s / s.sum())}, zero, **groups, **v2).gate_N,
        s[0, [2, 3]] / s.sum(),
    )


@pytest.mark.parametrize(
    ("groups", "renormalize"), [((1, 1), True), ((4, 2), False), ((8, 3), True)]
)
def test_sigmoid_equals_transformers_deepseek_v3(groups, renormalize):
    import torch
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    rng, (num, top) = np.random.default_rng(0), groups
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=12, n_routed_experts=16, num_experts_per_tok=4, n_group=num, topk_group=top,
            routed_scaling_factor=2.5, norm_topk_prob=renormalize,
        )
    )  # fmt: skip
    x, weight = (
        rng.normal(size=(64, 12)).astype(np.float32),
        rng.normal(size=(16, 12)).astype(np.float32),
    )
    bias = (0.3 * rng.normal(size=16)).astype(np.float32)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(weight))
        theirs.e_score_correction_bias.copy_(torch.tensor(bias))
        _, gates, experts = theirs(torch.tensor(x))
    own = {"k": 4, "num_groups": num, "top_groups": top, "scale": 2.5, "renormalize": renormalize}
    got = route("sigmoid", x, {"gate": weight.T}, {"bias": bias}, 16, **own)

    def dense(experts, gates):
        return np.stack([np.bincount(e, g, 16) for e, g in zip(experts, gates, strict=True)])

    ours = dense(got.expert_index_N.reshape(64, 4), got.gate_N.reshape(64, 4))
    np.testing.assert_allclose(ours, dense(experts.numpy(), gates.numpy()), atol=1e-6)
    assert ((ours > 0).sum(1) == 4).all()


def updated(name, state, totals, num_experts, **changes):
    cfg = RouterCfg(
        num_experts, options(name, **changes), group_rows=1, vocab_size=64, total=lambda z: z
    )
    return ROUTERS[name].update(state, totals, cfg)


def test_bias_update_by_hand(float64):
    """Counts (4, 0, 2, 2) have the mean 2: down, up, and two that stay.

    Without tokens nothing moves.
    """
    state = {"bias": jnp.array([0.1, 0.2, 0.3, 0.4])}
    new = updated("sigmoid", state, {"counts": jnp.array([4.0, 0, 2, 2])}, 4, bias_rate=0.05)
    np.testing.assert_allclose(new["bias"], [0.05, 0.25, 0.3, 0.4])
    for counts, rate in ((jnp.zeros(4), 0.05), (jnp.array([4.0, 0, 2, 2]), 0.0)):
        same = updated("sigmoid", state, {"counts": counts}, 4, bias_rate=rate)
        np.testing.assert_array_equal(same["bias"], state["bias"])


def test_quantile_of_a_histogram_by_hand(float64):
    """4 bins of width 1/2 from -1.

    A quarter of (0, 4, 4, 0) is 2, half of the second bin: -0.25. Half of (2, 0, 0, 2) ends the
    first.
    """
    histogram = jnp.array([[0.0, 4, 4, 0], [2, 0, 0, 2]])
    np.testing.assert_allclose(quantile.quantile(histogram, 0.25, -1.0, 0.5), [-0.25, -0.75])
    np.testing.assert_allclose(quantile.quantile(histogram, 0.5, -1.0, 0.5), [0.0, -0.5])
    np.testing.assert_allclose(quantile.quantile(histogram, 1.0, -1.0, 0.5), [0.5, 1.0])


def test_quantile_update_is_that_of_the_scores(float64):
    """Within a bin of NumPy's quantile of r = (k + 1)-th largest biased score - score; padding
    counts nowhere.
    """
    x, (params, state) = np.random.default_rng(1).normal(size=(600, 6)), first_weights("quantile")
    valid = np.arange(600) % 3 > 0
    got = route(
        "quantile", x, params, state, 8, placed={"num_rows": 4, "valid_T": valid}, k=3, bins=400
    )
    histogram = got.sums["histogram"]
    assert histogram.shape == (4, 8 * 400) and histogram.sum() == 400 * 8
    new = updated("quantile", state, {"histogram": histogram.sum(0)}, 8, k=3, bins=400)["bias"]
    score = 1 / (1 + np.exp(-x[valid] @ np.asarray(params["gate"])))
    required = np.sort(score + np.asarray(state["bias"]), 1)[:, [-4]] - score
    want = np.quantile(required, 3 / 8, axis=0)
    np.testing.assert_allclose(new, want - want.mean(), atol=2 * (2 + np.ptp(state["bias"])) / 400)
    half = updated("quantile", state, {"histogram": histogram.sum(0)}, 8, k=3, bins=400, ema=0.5)[
        "bias"
    ]
    np.testing.assert_allclose(half, (new + state["bias"] - state["bias"].mean()) / 2, atol=1e-12)
    nothing = updated("quantile", state, {"histogram": 0 * histogram.sum(0)}, 8, k=3, bins=400)[
        "bias"
    ]
    np.testing.assert_array_equal(nothing, state["bias"])


def test_quantile_bias_balances_in_a_few_steps(float64):
    """Logits with expert means from -1 to 1; the bias of the sigmoid router would need a thousand
    steps of 0.001.
    """
    x = np.concatenate([np.random.default_rng(1).normal(size=(2048, 8)), np.ones((2048, 1))], 1)
    params = {"gate": np.concatenate([0.7 * np.eye(8), np.linspace(-1, 1, 8)[None]])}
    state, excess = {"bias": jnp.zeros(8)}, []
    for _ in range(6):
        sums = route("quantile", x, params, state, 8).sums
        excess.append(float(sums["counts"].max() / sums["counts"].mean() - 1))
        state = updated("quantile", state, {"histogram": sums["histogram"].sum(0)}, 8)
    assert excess[0] > 1 and excess[-1] < 0.1, excess


def test_cosine_by_hand(float64):
    """x = (3, 4) has the cosines .6 and .8 with the axes; at temperature .5 the logits are 1.2 and
    1.6. Lengths do not matter.
    """
    params = {"project": np.eye(2), "experts": np.diag([7.0, 0.1]), "temperature": np.array(0.5)}
    for scale in (1.0, 1e3):
        got = route(
            "cosine", scale * np.array([[3.0, 4.0]]), params, num_experts=2, k=1, renormalize=False
        )
        assert got.expert_index_N.tolist() == [1]
        np.testing.assert_allclose(got.gate_N, [1 / (1 + np.exp(-0.4))])
    cold = route(
        "cosine",
        np.array([[3.0, 4.0]]),
        params | {"temperature": 1e-9},
        num_experts=2,
        min_temperature=0.4,
    )
    np.testing.assert_allclose(cold.sums["z"], [np.logaddexp(1.5, 2.0) ** 2])
    assert ROUTERS["cosine"].params(Sizes(6, 8, 64), options("cosine"))["project"].shape == (6, 4)


def test_cosine_gradients_are_those_of_differences_and_finite_for_a_zero_token(float64):
    params, _ = first_weights("cosine")
    x, weight = (
        np.random.default_rng(1).normal(size=(5, 6)),
        np.random.default_rng(2).normal(size=10),
    )

    def loss(params, x):
        return (route("cosine", x, params, num_experts=8).gate_N * weight).sum()

    check_grads(loss, (params, x), order=1, modes="rev", atol=1e-6, rtol=1e-6)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(loss, (0, 1))(params, 0 * x)))


def test_null_by_hand(float64):
    """Probabilities .4 .3 .2 .1 of two experts and two null ones, k = 3: the third is null."""

    def one(**changes):
        return route("null", np.eye(1), {"gate": LOGITS}, num_experts=2, k=3, num_null=2, **changes)

    wants = {"all": ([4 / 9, 3 / 9, 0], 2 / 9), "none": ([0.4, 0.3, 0], 0.2)}
    for renormalize, (gates, copied) in wants.items():
        got = one(kind="copy", renormalize=renormalize)
        assert got.expert_index_N.tolist() == [0, 1, 2]
        np.testing.assert_allclose(got.gate_N, gates)
        np.testing.assert_allclose(got.copy_T, [copied])
    zero = one(renormalize="real")
    assert zero.copy_T is None
    np.testing.assert_allclose(zero.gate_N, [4 / 7, 3 / 7, 0])
    assert zero.sums["counts"].tolist() == [[1, 1, 1, 0]]
    assert zero.sums["assigned"].tolist() == [2] and one().sums["gate"].tolist() == pytest.approx(
        [7 / 9]
    )


def test_null_classes_are_balanced_as_one(float64):
    """AdaMoE, eq.

    6. One expert and two null classes, k = 1; the null class that is taken never, or in turn, is
    the same loss.

    P = (1/2, 1/4, 1/4) on average and half of the choices null: 3 (1/2 1/2 + 1/4 1/4 + 1/4 1/4) =
    9/8.
    """
    prob_TC = (
        np.array([[0.8, 0.1, 0.1], [0.2, 0.41, 0.39]]),
        np.array([[0.8, 0.1, 0.1], [0.2, 0.39, 0.41]]),
    )
    for prob in (np.concatenate([prob_TC[0]] * 2), np.concatenate(prob_TC)):
        got = route("null", prob @ np.eye(3), {"gate": np.eye(3)}, num_experts=1, k=1, num_null=2)
        want = route("null", np.log(prob), {"gate": np.eye(3)}, num_experts=1, k=1, num_null=2)
        assert got.expert_index_N.tolist() == want.expert_index_N.tolist() == [0, 1, 0, 1]
        totals = load.totals({name: z[None] for name, z in want.sums.items()})
        probs_C = prob.mean(0)
        np.testing.assert_allclose(
            losses.balance.value(totals), 3 * (probs_C * [0.5, 0.25, 0.25]).sum()
        )
        np.testing.assert_allclose(
            losses.sequence_balance.value(totals), losses.balance.value(totals)
        )
        figures = load.metrics(totals | {"dropped": jnp.zeros(1)})
        assert figures["active"].tolist() == [0.5] and figures["max_vio"].tolist() == [
            0.5
        ]  # shares 1/2, 1/4, 1/4


def test_null_token_without_real_expert_and_padding(float64):
    gate = {"gate": np.log([[1.0, 2.0, 3.0, 4.0]])}
    none = route("null", np.eye(1), gate, num_experts=2, k=2, num_null=2, renormalize="real")
    assert (
        none.expert_index_N.tolist() == [2, 2]
        and none.gate_N.tolist() == [0, 0]
        and np.isfinite(none.sums["gate"]).all()
    )

    def loss(gate):
        return route(
            "null", np.eye(1), gate, num_experts=2, k=2, num_null=2, renormalize="real"
        ).gate_N.sum()

    assert np.isfinite(jax.grad(loss)(gate)["gate"]).all()
    placed = {"valid_T": [True, False]}
    copied = route(
        "null", np.ones((2, 1)), gate, num_experts=2, k=2, num_null=2, kind="copy", placed=placed
    )
    np.testing.assert_allclose(copied.copy_T, [1, 0])


@pytest.mark.parametrize(("num_experts", "k"), [(8, 2), (8, 3), (6, 4), (4, 4)])
def test_uniform_is_exactly_even(num_experts, k):
    """In every prefix of a document, and with it in every part, loads differ by at most one; after
    E / gcd(E, k) tokens by none.
    """
    got = route("uniform", np.zeros((2 * num_experts, 2)), num_experts=num_experts, k=k)
    chosen_TK = np.asarray(got.expert_index_N).reshape(-1, k)
    counts_TE = (chosen_TK[:, :, None] == np.arange(num_experts)).sum(1)
    assert counts_TE.max() == 1, "distinct experts"
    for begin in range(num_experts):
        spread = np.ptp(np.cumsum(counts_TE[begin:], 0), axis=1)
        assert spread.max() <= 1
        assert (
            spread[
                num_experts // np.gcd(num_experts, k) - 1 :: num_experts // np.gcd(num_experts, k)
            ]
            == 0
        ).all()
    np.testing.assert_allclose(got.gate_N, 1 / k)


def test_random_is_a_function_of_layer_position_and_token():
    x, ids = np.zeros((512, 2)), np.random.default_rng(0).integers(0, 64, 512)
    args = {"num_experts": 8, "k": 3}
    salt = {"salt": jnp.float32(0.3)}
    placed = {"num_rows": 4, "id_T": ids}
    got = route("random", x, None, salt, placed=placed, **args)
    chosen = np.asarray(got.expert_index_N.reshape(4, 128, 3))
    assert all(len(set(row)) == 3 for row in chosen.reshape(-1, 3).tolist())
    assert np.abs(got.sums["counts"].sum(0) - 192).max() < 5 * np.sqrt(512 * 3 / 8 * 5 / 8)
    alone = route(
        "random",
        x[128:256],
        None,
        salt,
        train=True,
        key=9,
        placed={"row_b": [77], "id_T": ids[128:256]},
        **args,
    )
    assert alone.expert_index_N.tolist() == chosen[1].reshape(-1).tolist()
    for other in ({"state": {"salt": jnp.float32(0.31)}}, {"state": salt, "seed": 1}):
        assert (
            route("random", x, None, placed=placed, **{**args, **other}).expert_index_N
            != got.expert_index_N
        ).mean() > 0.5
    moved = route("random", x, None, salt, placed={"num_rows": 4, "id_T": np.roll(ids, 1)}, **args)
    assert (moved.expert_index_N != got.expert_index_N).mean() > 0.5


NAMES = ["switch", "noisy_top_k", "sigmoid", "quantile", "cosine", "null", "uniform", "random"]


@pytest.mark.parametrize("name", NAMES)
def test_same_on_every_mesh(float64, name):
    """Each of four devices routes two of eight rows: what one device routes, with one token in five
    padding.
    """
    changes = {"kind": "copy", "k": 3, "num_null": 2} if name == "null" else {}
    own = options(name, **changes)
    params, state = first_weights(name, **changes)
    rng = np.random.default_rng(1)
    x, ids, valid = (
        rng.normal(size=(8, 6, 6)),
        rng.integers(0, 64, (8, 6)),
        rng.random((8, 6)) > 0.2,
    )
    cfg = RouterCfg(8, own, group_rows=1, vocab_size=64, total=lambda z: z)

    def run(params, state, x, ids, valid, row):
        placed = {
            "num_rows": len(x),
            "valid_T": valid.reshape(-1),
            "row_b": row,
            "id_T": ids.reshape(-1),
        }
        tokens = make_tokens(x.reshape(-1, 6), **placed)
        routing = ROUTERS[name].route(
            params, state, tokens, cfg=cfg, rng=jax.random.key(3), train=True
        )
        return routing.expert_index_N, routing.gate_N, routing.copy_T, dict(routing.sums)

    batch = (x, ids, valid, np.arange(8))
    want = jax.jit(run)(params, state, *batch)
    with jax.set_mesh(meshes.make(2, 2, 2)):
        rows = [jax.device_put(a, P(BATCH)) for a in batch]
        over = jax.shard_map(run, in_specs=(P(), P(), *[P(BATCH)] * 4), out_specs=P(BATCH))
        got = jax.device_get(jax.jit(over)(*jax.device_put((params, state), P()), *rows))
    np.testing.assert_array_equal(got[0], want[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, want)
    assert (want[0].reshape(48, -1)[~valid.reshape(-1)] == 8).all() and (want[0] < 8).any()


@pytest.mark.usefixtures("standard_promotion")
def test_bias_update_of_a_model_is_the_hand_calculation_on_every_mesh(float64):
    """bias = rate x sign(mean count - count) of the whole step, with padding and packed rows; on
    the mesh of two micro-batches.
    """
    changes = {
        "model.moe.router": "sigmoid",
        "model.moe.routers.sigmoid.bias_rate": 0.125,
        "model.repeats": 1,
        "optim.optimizer": "sgd",
        "optim.clip_norm": 0.0,
    }
    ends = []
    for shape, micro in (((1, 1, 1), {}), ((2, 2, 2), {"train.micro_batch_size": 8})):
        state, (row,) = tiny.Program(shape, changes | micro).run(1)
        counts = row["moe"]["counts"]
        (bias,) = jax.tree.leaves(jax.device_get(state.router_state))
        bias = bias.reshape(1, 8)
        np.testing.assert_array_equal(bias, 0.125 * np.sign(counts.mean(1, keepdims=True) - counts))
        assert (bias != 0).any()
        ends.append(bias)
    np.testing.assert_array_equal(*ends)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("router", "optimizer"),
    [("random", "muon"), ("uniform", "adamw"), ("cosine", "adafactor"), ("noisy_top_k", "muon")],
)
def test_a_step_takes_routers_without_weights_and_with_other_ones(router, optimizer):
    """Traced alone: no parameters, no state, a scalar, two matrices."""
    dtypes = {"model.param_dtype": "float32", "model.dtype": "float32"}
    program = tiny.Program(
        (1, 1, 1), {"model.moe.router": router, "optim.optimizer": optimizer, **dtypes}
    )
    with jax.set_mesh(program.mesh):
        state = jax.eval_shape(program.init, jax.random.key(0))
        after, _ = jax.eval_shape(
            program.step, state, tiny.put(program.cfg, tiny.batch(program.cfg))
        )
    assert jax.tree.structure(after) == jax.tree.structure(state)
