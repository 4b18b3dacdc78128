"""What every router of ROUTERS promises, by existing: one suite for all, in float64 unless stated.

The tiers: every router's routing on two meshes against one device, and through the layer on one of
them with one dispatcher, where meshes and dispatchers take turns (here); every router with every
dispatcher on three meshes, with gradients (`full`).
"""

import jax
import jax.numpy as jnp
import layer_cases
import meshes
import numpy as np
import pytest
import router_cases
import router_suite
from router_cases import CASES, B, D, E, S
from router_suite import T, assert_alike, close, per_token, routed

from moe_jax.moe.routing import ROUTERS

LEARNED = [
    c
    for c, (r, _) in CASES.items()
    if ROUTERS[r].params(router_cases.SIZES, router_cases.options(c))
]
NO_GRADIENT = {
    "counts",
    "unbiased",
    "first",
    "tokens",
    "entropy",
    "gate",
    "gate_max",
    "dropped",
}  # of the sums, by contract


every = pytest.mark.parametrize("case", CASES)


@every
def test_experts_of_a_token_are_distinct_and_as_many_as_declared(float64, case):
    router_suite.experts_of_a_token_are_distinct_and_as_many_as_declared(case)


@every
def test_gates_sum_as_declared(float64, case):
    router_suite.gates_sum_as_declared(case)


@every
def test_sums_are_those_of_the_assignments(float64, case):
    router_suite.sums_are_those_of_the_assignments(case)


@every
def test_padding_changes_nothing(float64, case):
    router_suite.padding_changes_nothing(case)


def permuted(weight, order_E):
    """A weight with its expert dimension permuted; of E experts and further classes only the
    experts.
    """
    for dim, length in enumerate(weight.shape):
        if length >= E and length != D:
            return np.take(weight, np.concatenate([order_E, np.arange(E, length)]), dim)
    return weight


@pytest.mark.parametrize("case", LEARNED)
def test_permuting_experts_permutes_the_result(float64, case):
    """In evaluation: noise is drawn per expert. Groups of experts stay together."""
    num_groups = getattr(router_cases.options(case), "num_groups", 1)
    order = np.arange(E).reshape(num_groups, -1)[::-1, ::-1].reshape(-1)
    params, state = router_cases.weights(case)
    given = router_cases.tokens(case)
    if given.recorded:
        given = given._replace(
            recorded=(np.argsort(order)[given.recorded[0]].astype(np.int32), given.recorded[1])
        )

    def move(part):
        return {name: permuted(weight, order) for name, weight in part.items()}

    got, sums, _ = router_cases.answer(case, given, move(params), move(state), train=False)
    plain, plain_sums, _ = routed(case, train=False)
    assert_alike(got, {n: v if n == "copy" else v[:, order] for n, v in plain.items()}, "permuted")
    classes = np.concatenate([order, np.arange(E, sums["counts"].shape[1])])
    for name, value in sums.items():
        if value.shape == sums["counts"].shape:
            close(value, plain_sums[name][:, classes], err_msg=name)


@every
def test_permuting_the_tokens_of_a_row_permutes_the_result(float64, case):
    """Tokens with all that belongs to them, position too; in evaluation, because noise is drawn by
    place.
    """
    place = np.concatenate(
        [S * row + np.random.default_rng(row).permutation(S) for row in range(B)]
    )
    moved = per_token(router_cases.tokens(case), lambda z: z[place])
    got, sums, _ = router_cases.answer(case, moved, *router_cases.weights(case), train=False)
    plain, plain_sums, _ = routed(case, train=False)
    assert_alike(got, {n: v[place] for n, v in plain.items()}, "permuted")
    assert_alike(sums, plain_sums, "permuted")


@every
def test_selection_in_bfloat16_is_that_of_float32(case):
    """The router's own weights are float32; x comes in bfloat16. 128 tokens and more."""

    def single(z):
        return z.astype(np.float32) if z.dtype == np.float64 else z

    weights = jax.tree.map(single, router_cases.weights(case))
    given = router_cases.tokens(case, num_rows=32)
    given = per_token(given, single)
    low = given._replace(x_TD=given.x_TD.astype(jnp.bfloat16), num_rows=None)

    def both(tokens, params, state):
        """One program: where the first operation widens x, the compiler sees the two as one."""
        tokens = tokens._replace(num_rows=32)
        wide = tokens._replace(x_TD=tokens.x_TD.astype(jnp.float32))
        return [
            router_cases.parts(router_cases.route(case, z, params, state), tokens)[:2]
            for z in (tokens, wide)
        ]

    results = jax.device_get(router_cases.compiled(both)(low, *weights))
    for part in (0, 1):
        for name, value in results[0][part].items():
            assert value.dtype == np.float32, f"{name} is not computed in float32"
            # The compiler may order the additions of a statistic differently; what was chosen and
            # counted is equal.
            rounding = 1e-5 if name == "load" else 0
            np.testing.assert_allclose(value, results[1][part][name], rtol=rounding, err_msg=name)


@every
def test_gradients_are_the_finite_differences(float64, case):
    """Of a smooth function of gates and sums, by x and parameters: the derivative along four random
    directions to 1e-6.
    """
    given, (params, state) = router_cases.tokens(case), router_cases.weights(case)
    rng = np.random.default_rng(3)
    factors = jax.tree.map(lambda z: rng.normal(size=z.shape), routed(case)[:2])

    def value(x_TD, params):
        routing = router_cases.route(case, given._replace(x_TD=x_TD), params, state)
        gates, sums, _ = router_cases.parts(routing, given)
        terms = [(jnp.sin(z) * factors[0][name]).sum() for name, z in gates.items()]
        return sum(
            terms
            + [(jnp.sin(z) * factors[1][n]).sum() for n, z in sums.items() if n not in NO_GRADIENT]
        )

    run = router_cases.compiled(jax.value_and_grad(value, argnums=(0, 1)))
    at = (given.x_TD, params)
    _, gradient = run(*at)
    for moves in ((1, 1), (1, 0), (0, 1), (1, 1)):  # of x, of the parameters
        way = tuple(
            jax.tree.map(lambda z, m=m: m * rng.normal(size=z.shape), part)
            for m, part in zip(moves, at)
        )
        up, down = (
            run(*jax.tree.map(lambda z, d, h=h: z + h * d, at, way))[0] for h in (1e-6, -1e-6)
        )
        have = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, way)))
        np.testing.assert_allclose(have, (up - down) / 2e-6, rtol=1e-6, atol=1e-6)


def tiered():
    """(case, mesh): further options of a router on one mesh only, unless with --full."""
    for case in CASES:
        for shape in ((2, 2, 2), (1, 8, 1), (1, 1, 1)):
            more = shape == (1, 1, 1) or (case not in ROUTERS and shape == (1, 8, 1))
            name = f"{case}, {meshes.name(shape)}"
            yield pytest.param(case, shape, id=name, marks=[pytest.mark.full] if more else [])


@pytest.mark.parametrize(("case", "shape"), list(tiered()))
def test_routing_is_the_same_on_every_mesh(float64, case, shape):
    router_suite.routing_is_the_same_on_a_mesh(case, shape)


TURNS = {case: i for i, case in enumerate(CASES)}
SAME_LAYER = ("top_k after", "top_k raw", "sigmoid groups")  # other gates, nothing else for a layer
some = [
    pytest.param(case, marks=pytest.mark.full) if case in SAME_LAYER else case for case in CASES
]


@pytest.mark.parametrize("case", some)
def test_the_layer_serves_what_was_routed(float64, case):
    """Output, drops and sums of the whole layer on a mesh: the oracle's loop over the routing of
    the router alone.
    """
    dispatcher = layer_cases.dispatchers(case)[TURNS[case] % len(layer_cases.dispatchers(case))]
    y, sums, _ = layer_cases.run(case, dispatcher, [(2, 2, 2), (1, 8, 1)][TURNS[case] // 2 % 2])
    want_y, want_sums = layer_cases.expected(case, dispatcher, *routed(case))
    np.testing.assert_allclose(y, want_y, rtol=0, atol=1e-11)
    assert_alike(sums, want_sums, "sums")


def test_an_expert_that_a_recording_names_twice_is_served_once_with_both_gates(float64):
    given, (params, state) = (
        router_cases.tokens("recorded", padded=False),
        router_cases.weights("recorded"),
    )
    expert, gate = given.recorded[0].copy(), given.recorded[1]
    expert[::2, 1] = expert[::2, 0]
    dense, sums, _ = router_cases.answer(
        "recorded", given._replace(recorded=(expert, gate)), params, state
    )
    np.testing.assert_array_equal(dense["hits"].sum(1), np.where(np.arange(T) % 2, 2, 1))
    close(dense["gates"].sum(1), gate.sum(1), atol=1e-12)
    close(dense["gates"][np.arange(0, T, 2), expert[::2, 0]], gate[::2].sum(1), atol=1e-12)
    assert sums["counts"].sum() == 1.5 * T


@pytest.mark.full
@every
def test_the_layer_is_the_same_on_every_mesh(float64, case):
    """Every dispatcher on three meshes: output, sums, and the gradients of both by x, router and
    experts.
    """
    for dispatcher in layer_cases.dispatchers(case):
        want_y, want_sums = layer_cases.expected(case, dispatcher, *routed(case))
        _, _, want = layer_cases.run(case, dispatcher, (1, 1, 1), gradient=True)
        for shape in ((2, 2, 2), (1, 8, 1)):
            y, sums, gradient = layer_cases.run(case, dispatcher, shape, gradient=True)
            np.testing.assert_allclose(y, want_y, rtol=0, atol=1e-11)
            assert_alike(sums, want_sums, "sums")
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), gradient, want
            )
