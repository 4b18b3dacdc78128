"""The auxiliary losses: by hand, and in terms of other codebases' definitions.

What may not change them is in test_balance.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import router_cases

from moe_jax.moe import load, losses
from moe_jax.moe.routing.contract import Tokens
from moe_jax.moe.routing.statistics import statistics


def sums_of(logits_BSE, k, valid_BS=None):
    """The sums per row of one layer, [1, B, ...], of a softmax router that takes the k largest."""
    num_rows, length, num_experts = logits_BSE.shape
    valid_BS = np.ones((num_rows, length), bool) if valid_BS is None else valid_BS
    none = jnp.zeros(num_rows * length, jnp.int32)
    router_logits_TE = jnp.asarray(logits_BSE).reshape(-1, num_experts)

    @jax.jit
    def sums(router_logits_TE, valid_T):
        tokens = Tokens(router_logits_TE, none, none, none, none, valid_T, num_rows)
        gate_TK, expert_index_TK = jax.lax.top_k(jax.nn.softmax(router_logits_TE), k)
        return {
            name: x[None]
            for name, x in statistics(router_logits_TE, expert_index_TK, gate_TK, tokens).items()
        }

    return sums(router_logits_TE, jnp.asarray(valid_BS.reshape(-1)))


def random_logits(num_rows=4, length=16, num_experts=6, seed=0):
    return 2 * np.random.default_rng(seed).normal(size=(num_rows, length, num_experts))


# By hand


def by_hand():
    """Two experts, k = 1, three rows: two tokens of expert 0; one of each; padding.

    Probabilities summed over each row.
    """
    rows = {
        "counts": [[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]],
        "probs": [[1.6, 0.4], [0.8, 1.2], [0.0, 0.0]],
    }
    rows |= {
        "tokens": [2.0, 2.0, 0.0],
        "z": [3.0, 5.0, 0.0],
        "load": [[2.0, 0.5], [0.5, 1.0], [0.0, 0.0]],
    }
    rows |= {"first": rows["counts"], "importance": rows["counts"]}
    return {name: jnp.array([value]) for name, value in rows.items()}


def test_every_loss_by_hand(float64):
    """Of the batch f = (3/4, 1/4), P = (0.6, 0.4).

    Switch: 2 (0.45 + 0.1) = 1.1; GShard: (0.45 + 0.1) / 2 = 0.275.

    Row 1: f = (1, 0), P = (0.8, 0.2): 2 x 0.8 = 1.6; row 2: f = (1/2, 1/2): 1; the padded row
    counts nowhere: mean 1.3.
    Importance (3, 1): mean 2, variance 1: 1/4. Load (2.5, 1.5): variance 1/4: 1/16. z: 8 / 4.
    """
    totals = load.totals(by_hand())
    want = {"balance": 1.1, "gshard": 0.275, "sequence_balance": 1.3, "micro_batch_balance": 1.1}
    want |= {"importance": 0.25, "load": 0.0625, "z": 2.0}
    assert want.keys() == losses.LOSSES.keys()
    for name, value in want.items():
        np.testing.assert_allclose(losses.LOSSES[name].value(totals), [value], err_msg=name)


def test_micro_batches_by_hand(float64):
    """The rows above as three micro-batches: products 1.6 and 1, and one without tokens that counts
    nowhere; the rest is as before.
    """
    each = [load.totals(jax.tree.map(lambda z, i=i: z[:, i : i + 1], by_hand())) for i in range(3)]
    summed, whole = jax.tree.map(lambda *z: sum(z), *each), load.totals(by_hand())
    np.testing.assert_allclose(losses.micro_batch_balance.value(summed), [1.3])
    for name in losses.LOSSES.keys() - {"micro_batch_balance"}:
        np.testing.assert_allclose(
            losses.LOSSES[name].value(summed), losses.LOSSES[name].value(whole), err_msg=name
        )


def test_the_weighted_sum_and_what_is_reported(float64):
    """Zero coefficients add nothing but are reported; a loss that the router has no sum for is left
    out unless it is asked for.
    """
    totals = load.totals(by_hand())
    coefficients = dict.fromkeys(losses.LOSSES, 0.0) | {"balance": 0.5, "z": 0.25}
    value, parts = losses.auxiliary(totals, coefficients)
    np.testing.assert_allclose(value, 0.5 * 1.1 + 0.25 * 2.0)
    assert parts.keys() == losses.LOSSES.keys() and parts["sequence_balance"] == pytest.approx(1.3)
    del totals["load"]
    assert losses.auxiliary(totals, coefficients)[1].keys() == losses.LOSSES.keys() - {"load"}
    weighted = totals | {"balance_weight": 3.0 * totals["tokens"]}
    np.testing.assert_allclose(
        losses.auxiliary(weighted, coefficients)[0], 3 * 0.5 * 1.1 + 0.25 * 2.0
    )
    weighted |= {
        "l1_weight": 0.125 * totals["tokens"],
        "l1_load": totals["counts"],
    }  # f P = (0.45, 0.1)
    terms = losses.terms(weighted, coefficients)
    want = {"balance": 3 * 0.5 * 1.1, "z": 0.25 * 2.0, "l1": 0.125 * 0.55}
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(want)


@pytest.mark.parametrize(("num_experts", "k"), [(4, 1), (6, 2), (8, 3)])
def test_balanced_and_worst_values(float64, num_experts, k):
    """What docs/balance.md states: balanced, every expert has the same share; worst, all tokens
    have probability 1 on expert 0.
    """
    turns = np.eye(num_experts)[np.arange(2 * num_experts) % num_experts]
    ramp = np.stack(
        [np.roll(-np.arange(num_experts), i) for i in range(num_experts)] * 2
    )  # choices i, i + 1, ..
    balanced, worst = 1e-9 * ramp[None] + 0 * turns, np.zeros((1, 2 * num_experts, num_experts))
    worst[:, :, 0] = 1e4
    worst[:, :, 1:k] = 1
    for logits, switch, gshard, variation in (
        (balanced, 1.0, num_experts**-2, 0.0),
        (worst, num_experts / k, 1 / num_experts, num_experts - 1),
    ):
        totals = load.totals(sums_of(logits, k))
        for name in ("balance", "sequence_balance", "micro_batch_balance"):
            np.testing.assert_allclose(
                losses.LOSSES[name].value(totals), [switch], rtol=1e-8, err_msg=name
            )
        np.testing.assert_allclose(losses.gshard.value(totals), [gshard], rtol=1e-8)
        np.testing.assert_allclose(losses.importance.value(totals), [variation], atol=1e-8)


# Other definitions, each as its source writes it: arguments chosen [T, K], probs [T, E];
# docs/balance.md has the sources.


def hits(chosen_TK, num_experts):
    return (chosen_TK[:, :, None] == np.arange(num_experts)).astype(float)


def switch_paper(chosen_TK, probs_TE):
    fraction, mean = hits(chosen_TK, probs_TE.shape[1])[:, 0].mean(0), probs_TE.mean(0)
    return probs_TE.shape[1] * sum(fraction * mean)


def gshard_paper(chosen_TK, probs_TE):
    return (
        hits(chosen_TK, probs_TE.shape[1])[:, 0].sum(0) / len(probs_TE) * probs_TE.mean(0)
    ).mean()


def gshard_code(chosen_TK, probs_TE):
    """As in Mesh-TensorFlow, and DeepSpeed's top-1 and top-2."""
    density = hits(chosen_TK, probs_TE.shape[1])[:, 0].mean(0)
    return (density * probs_TE.mean(0)).mean() * probs_TE.shape[1] ** 2


def deepspeed_top_k(chosen_TK, probs_TE):
    num_experts, mask_TE = probs_TE.shape[1], hits(chosen_TK, probs_TE.shape[1]).max(1)
    return (probs_TE.mean(0) * mask_TE.mean(0)).mean() * num_experts**2 / chosen_TK.shape[1]


def megatron(chosen_TK, probs_TE):
    (num_tokens, num_experts), k = probs_TE.shape, chosen_TK.shape[1]
    count_E = np.bincount(chosen_TK.reshape(-1), minlength=num_experts)
    return (probs_TE.sum(0) * count_E).sum() * num_experts / (k * num_tokens * num_tokens)


def megablocks(chosen_TK, probs_TE):
    """Also OLMoE. Of one layer; the mean over layers with more."""
    (num_tokens, num_experts), k = probs_TE.shape, chosen_TK.shape[1]
    return (
        num_experts
        / (num_tokens * k)
        * np.bincount(chosen_TK.reshape(-1), minlength=num_experts)
        @ probs_TE.mean(0)
    )


def deepseek_v2_code(chosen_TK, probs_TE):
    """seq_aux = False."""
    num_experts = probs_TE.shape[1]
    return (
        probs_TE.mean(0)
        * hits(chosen_TK, num_experts).reshape(-1, num_experts).mean(0)
        * num_experts
    ).sum()


def deepseek_v3_paper(chosen_TK, probs_TE):
    """Eq. 17-20, of one sequence."""
    (num_tokens, num_experts), k = probs_TE.shape, chosen_TK.shape[1]
    f_E = num_experts / (k * num_tokens) * hits(chosen_TK, num_experts).sum((0, 1))
    return (f_E * (probs_TE / probs_TE.sum(1, keepdims=True)).mean(0)).sum()


# (definition, ours, factor: theirs = factor(E, K) x ours); Switch's paper is k = 1 only
CONVERSIONS = {
    "Switch paper, of first choices": (switch_paper, "gshard", lambda e, k: e**2),
    "GShard paper": (gshard_paper, "gshard", lambda e, k: 1),
    "GShard code": (gshard_code, "gshard", lambda e, k: e**2),
    "DeepSpeed top-k": (deepspeed_top_k, "balance", lambda e, k: 1),
    "Megatron-LM": (megatron, "balance", lambda e, k: 1),
    "MegaBlocks, OLMoE": (megablocks, "balance", lambda e, k: 1),
    "DeepSeek-V2 code": (deepseek_v2_code, "balance", lambda e, k: 1),
    "DeepSeek-V3 paper": (deepseek_v3_paper, "sequence_balance", lambda e, k: 1),
}


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions(float64, name, k):
    """Of one sequence, where the sequence-wise loss is that of the batch."""
    theirs, ours, factor = CONVERSIONS[name]
    logits = random_logits(num_rows=1, length=64)
    probs_TE = np.asarray(jax.nn.softmax(logits[0]))
    chosen_TK = np.argsort(-probs_TE, 1)[:, :k]
    mine = losses.LOSSES[ours].value(load.totals(sums_of(logits, k)))[0]
    np.testing.assert_allclose(theirs(chosen_TK, probs_TE), factor(6, k) * mine, rtol=1e-12)


@pytest.mark.parametrize("router", ["sigmoid", "quantile"])
def test_the_sequence_wise_loss_counts_without_the_bias(float64, router):
    """DeepSeek-V3's eq.

    18 takes the top K of s, not of s + b; the load that the bias answers to is that of s + b.
    """
    given, (params, state) = router_cases.tokens(router, padded=False), router_cases.weights(router)
    state = state | {"bias": 0.3 * np.random.default_rng(3).normal(size=router_cases.E)}
    score_TE = np.asarray(jax.nn.sigmoid(given.x_TD @ params["gate"]))

    def of_row(z):
        return z.reshape(router_cases.B, router_cases.S, -1)

    want = np.mean([deepseek_v3_paper(np.argsort(-s, 1)[:, :2], s) for s in of_row(score_TE)])
    sums = router_cases.answer(router, given, params, state)[1]
    assert (sums["unbiased"] != sums["counts"]).any()
    totals = load.totals({name: z[None] for name, z in sums.items()})
    np.testing.assert_allclose(losses.sequence_balance.value(totals)[0], want, rtol=1e-12)


def test_with_one_choice_switch_is_gshard_times_the_square_of_experts(float64):
    totals = load.totals(sums_of(random_logits(), 1))
    np.testing.assert_allclose(
        losses.balance.value(totals), 36 * losses.gshard.value(totals), rtol=1e-12
    )
    top_2 = load.totals(sums_of(random_logits(), 2))
    assert (
        abs(losses.balance.value(top_2) - 36 * losses.gshard.value(top_2))[0] > 1e-3
    )  # second choices count in one only


def test_switch_with_hard_probabilities_is_one_more_than_the_variation(float64):
    """E sum f^2 = 1 + CV^2(f): the link between Switch's and Shazeer's losses."""
    rng = np.random.default_rng(0)
    count_LE = jnp.asarray(rng.integers(1, 9, (3, 6)), jnp.float64)
    totals = {
        "counts": count_LE,
        "probs": count_LE,
        "tokens": count_LE.sum(1),
        "importance": count_LE,
    }
    np.testing.assert_allclose(
        losses.balance.value(totals), 1 + losses.importance.value(totals), rtol=1e-12
    )


# transformers: sums over layers before the product, and k times Switch's


def transformers_loss(logits_LBSE, k, valid_BS=None):
    """(value, gradient) of Mixtral's load_balancing_loss_func."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [torch.tensor(z.reshape(-1, z.shape[-1]), requires_grad=True) for z in logits_LBSE]
    mask = None if valid_BS is None else torch.tensor(valid_BS.astype(np.int64))
    value = load_balancing_loss_func(tuple(layers), logits_LBSE.shape[-1], k, mask)
    value.backward()
    return value.item(), np.stack([z.grad.numpy() for z in layers]).reshape(logits_LBSE.shape)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_is_transformers_up_to_k(float64, k, padded):
    logits = random_logits()
    valid = np.ones(logits.shape[:2], bool)
    if padded:
        valid[0, 5:] = valid[2, :9] = valid[3] = False
    value, gradient = transformers_loss(logits[None], k, valid if padded else None)

    def ours(logits):
        return k * losses.balance.value(load.totals(sums_of(logits, k, valid)))[0]

    mine, slope = jax.value_and_grad(ours)(jnp.asarray(logits))
    np.testing.assert_allclose(mine, value, rtol=1e-6)
    np.testing.assert_allclose(slope[None], gradient, rtol=1e-5, atol=1e-6 * np.abs(gradient).max())


def test_transformers_multiplies_after_it_has_averaged_the_layers(float64):
    """So with several layers it is our loss of the layers' summed statistics, which imbalances of
    opposite sign leave at 1.
    """
    logits = np.stack([random_logits(seed=0), -random_logits(seed=0)])
    value, _ = transformers_loss(logits, 2)
    layers = [load.totals(sums_of(z, 2)) for z in logits]
    summed = jax.tree.map(lambda *z: sum(z), *layers)
    np.testing.assert_allclose(2 * losses.balance.value(summed)[0], value, rtol=1e-6)
    assert abs(2 * np.mean([losses.balance.value(t)[0] for t in layers]) - value) > 1e-2
