"""What every router promises, each promise a function of a case of router_cases.py."""

import functools

import jax
import meshes
import numpy as np
import router_cases
from router_cases import CASES, B, E, S

from moe_jax.moe.routing import ROUTERS
from moe_jax.parallel.mesh import BATCH, P

T = B * S
ARRAYS = ("x_TD", "id_T", "position_T", "row_T", "segment_T", "valid_T")

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)


def router(case):
    return ROUTERS[CASES[case][0]]


@functools.cache
def routed(case, train=True):
    """(dense, sums, lists) of the standard tokens, in float64."""
    return router_cases.answer(
        case, router_cases.tokens(case), *router_cases.weights(case), train=train
    )


def assert_alike(have, want, what):
    """Two dicts of arrays, to 1e-12."""
    assert have.keys() == want.keys()
    for name in have:
        close(have[name], want[name], err_msg=f"{what}: {name}")


def experts_of_a_token_are_distinct_and_as_many_as_declared(case):
    (got, _, listed), valid = routed(case), router_cases.tokens(case).valid_T
    if "dispatch" in got:
        assert (got["combine"][~valid] == 0).all() and (got["dispatch"][~valid] == 0).all()
        return
    promise, hits = router(case).declared(E, router_cases.options(case)), got["hits"]
    assert hits.max() == 1, "an expert twice"
    assert (hits[~valid] == 0).all(), "padding was routed"
    assert len(listed[0]) == len(listed[1]) and set(listed[1]) <= set(range(E + 1))
    if promise.most is not None:
        assert hits.sum(1).max() <= promise.most
    if promise.exact:
        assert (hits[valid].sum(1) == promise.most).all()


def gates_sum_as_declared(case):
    got, valid = routed(case)[0], router_cases.tokens(case).valid_T
    promise = router(case).declared(E, router_cases.options(case))
    gates = got["combine" if "combine" in got else "gates"].reshape(T, -1)
    assert (gates[~valid] == 0).all() and np.isfinite(gates).all() and (gates >= 0).all()
    if promise.gate_sum is not None:
        missing = promise.gate_sum - gates[valid].sum(1) - got.get("copy", np.zeros(T))[valid]
        close(missing, 0)


def sums_are_those_of_the_assignments(case):
    """Per row: counts = served + dropped by the router itself; importance = the gates; tokens =
    valid tokens.
    """
    (got, sums, _), valid = routed(case), router_cases.tokens(case).valid_T.reshape(B, S)
    assert {
        "counts",
        "first",
        "probs",
        "importance",
        "z",
        "entropy",
        "gate",
        "gate_max",
        "tokens",
    } <= sums.keys()
    assert all(value.shape[0] == B and value.dtype == np.float64 for value in sums.values())
    close(sums["tokens"], valid.sum(1))
    empty = {name: value[valid.sum(1) == 0] for name, value in sums.items()}
    assert all((value == 0).all() for value in empty.values()), "a row of padding counts"
    if "dispatch" in got:
        return
    assert (sums["first"] <= sums["counts"] + 1e-12).all() and (
        sums["gate_max"] <= sums["gate"] + 1e-12
    ).all()
    by_row = {
        name: value.reshape(B, S, -1).sum(1)
        for name, value in ({"copy": np.zeros(T)} | got).items()
    }
    dropped = sums.get("dropped", np.zeros(B))
    close(sums["counts"][:, :E].sum(1), by_row["hits"].sum(1) + dropped)
    close(sums["gate"], (by_row["gates"].sum(1, keepdims=True) + by_row["copy"]).sum(1))
    if not dropped.any():
        close(sums["counts"][:, :E], by_row["hits"])
        close(sums["importance"][:, :E], by_row["gates"])


def padding_changes_nothing(case):
    """Other values in padded tokens, and further rows of padding."""
    given, weights = router_cases.tokens(case), router_cases.weights(case)
    pad, want = ~given.valid_T, routed(case)
    odd = given._replace(
        x_TD=np.where(pad[:, None], 1e3, given.x_TD), id_T=np.where(pad, 1, given.id_T)
    )
    have = router_cases.answer(case, odd, *weights)
    assert_alike(have[0], want[0], "other padding")
    assert_alike(have[1], want[1], "other padding")

    def longer(z):
        return np.concatenate([z, np.zeros_like(z[: 2 * S])])

    more = per_token(given, longer)._replace(num_rows=B + 2)
    have = router_cases.answer(case, more, *weights)
    assert all((value[T:] == 0).all() for value in have[0].values())
    assert_alike({name: value[:T] for name, value in have[0].items()}, want[0], "more padding")
    assert_alike({name: value[:B] for name, value in have[1].items()}, want[1], "more padding")


def per_token(tokens, change):
    """Tokens with every array over tokens changed alike."""
    arrays = {name: change(getattr(tokens, name)) for name in ARRAYS}
    return tokens._replace(**arrays, recorded=jax.tree.map(change, tokens.recorded))


def routing_is_the_same_on_a_mesh(case, shape):
    """The router inside a shard_map over the batch, against the router alone: equal experts in
    equal order, gates and sums to 1e-12.
    """
    params, state = router_cases.weights(case)
    given, devices = router_cases.tokens(case), shape[0] * shape[1]

    def body(arrays, recorded, params, state):
        local = given._replace(
            **dict(zip(ARRAYS, arrays)), num_rows=B // devices, recorded=recorded
        )
        routing = router_cases.route(
            case, local, params, state, total=lambda z: jax.lax.psum(z, BATCH)
        )
        return router_cases.parts(routing, local)

    with jax.set_mesh(meshes.make(*shape)):
        put = functools.partial(jax.tree.map, lambda z: meshes.put(z, "batch"))
        arrays = put((tuple(getattr(given, name) for name in ARRAYS), given.recorded))
        run = jax.shard_map(body, in_specs=(P(BATCH), P(BATCH), P(), P()), out_specs=P(BATCH))
        got = jax.device_get(router_cases.compiled(run)(*arrays, params, state))
    want = routed(case)
    assert router_cases.by_group(got[2], devices) == router_cases.by_group(want[2]), (
        "other experts, or another order"
    )
    assert_alike(got[0], want[0], "routing")
    assert_alike(got[1], want[1], "sums")
