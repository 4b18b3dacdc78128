"""Every router on a few random tokens, called alone, and its answer in a form that does not depend
on the order of the list.

CASES holds every line of ROUTERS with the options of configs/base.py, so that a new router is
covered by existing, and a few further options. Sizes: b rows of S tokens each, D model, E experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import RouterCfg, Routing, Sizes, Tokens
from moe_jax.parallel.compiling import QUICK

B, S, D, E, VOCAB = 8, 4, 24, 8, 64
GROUP_ROWS = 1
# Changes that any router needs at this size, and further options worth a run of the whole suite.
MORE = {
    "top_k after": ("top_k", {"softmax": "after", "k": 3, "scale": 1.5}),
    "top_k raw": ("top_k", {"renormalize": False}),
    "sigmoid groups": ("sigmoid", {"num_groups": 4, "top_groups": 2, "scale": 2.5, "k": 3}),
    "base batch": ("base", {"scope": "batch", "gates": "softmax", "k": 2}),
    "null copy": ("null", {"kind": "copy"}),
}
SIZES = Sizes(D, E, VOCAB)
CASES = {name: (name, {}) for name in ROUTERS} | MORE


def options(case):
    router, changes = CASES[case]
    return ROUTERS[router].options(**changes)


def weights(case, num_experts=E, d_model=D):
    """(params, state) as NumPy arrays: what starts at zero or one is moved a little, so that
    nothing is special.
    """
    rng = np.random.default_rng(1)
    router = ROUTERS[CASES[case][0]]
    sizes = Sizes(d_model, num_experts, VOCAB)

    def draw(weight):
        noise = rng.normal(size=weight.shape) * (weight.std or 0.1 * abs(weight.constant or 1))
        return weight.constant + noise

    return tuple(
        {n: draw(w) for n, w in part(sizes, options(case)).items()}
        for part in (router.params, router.state)
    )


def tokens(case, num_rows=B, length=S, seed=0, padded=True):
    """Random tokens; with `padded`, a row of padding and two padded tails.

    The rows' ids are no run of numbers.
    """
    rng = np.random.default_rng(seed)
    num = num_rows * length
    valid = np.ones((num_rows, length), bool)
    if padded:
        valid[1, length // 2 :] = valid[-1, -1:] = valid[num_rows // 2] = False
    recorded = ()
    if CASES[case][0] == "recorded":
        k = options(case).k
        expert = np.argsort(rng.random((num, E)), -1)[:, :k].astype(np.int32)
        recorded = (expert, rng.random(expert.shape))

    def flat(z):
        return np.broadcast_to(z, (num_rows, length)).reshape(-1).astype(np.int32)

    return Tokens(
        x_TD=rng.normal(size=(num, D)),
        id_T=rng.integers(0, VOCAB, num).astype(np.int32),
        position_T=flat(np.arange(length)[None]),
        row_T=flat(100 + 3 * np.arange(num_rows)[:, None]),
        segment_T=flat(valid),
        valid_T=valid.reshape(-1),
        num_rows=num_rows,
        recorded=recorded,
    )


def route(
    case,
    tokens,
    params,
    state,
    *,
    train=True,
    group_rows=GROUP_ROWS,
    num_experts=E,
    total=lambda z: z,
):
    cfg = RouterCfg(num_experts, options(case), group_rows, VOCAB, total)
    return ROUTERS[CASES[case][0]].route(
        params, state, tokens, cfg=cfg, rng=jax.random.key(7), train=train
    )


def answer(case, tokens, params, state, *, train=True):
    """(dense, sums, the lists of a Routing or ()) of a router alone, as NumPy arrays; compiled once
    per shape.
    """
    arrays = tokens._replace(num_rows=None)
    return jax.device_get(_program(case, tokens.num_rows, train)(arrays, params, state))


@functools.cache
def _program(case, num_rows, train):
    def run(arrays, params, state):
        tokens = arrays._replace(num_rows=num_rows)
        return parts(route(case, tokens, params, state, train=train), tokens)

    return compiled(run)


def parts(routing, tokens):
    """What `answer` returns, of a routing inside any program."""
    listed = (
        (routing.token_N, routing.expert_index_N, routing.order_N)
        if isinstance(routing, Routing)
        else ()
    )
    return dense(routing, tokens.id_T.shape[0]), dict(routing.sums), listed


def dense(routing, num_tokens, num_experts=E):
    """{name: array [T, E, ...]}: gates and number of assignments of each token and expert, or the
    mixtures of soft slots.
    """
    if not isinstance(routing, Routing):

        def flat(z):
            return z.reshape((num_tokens,) + z.shape[2:])

        return {"dispatch": flat(routing.dispatch_GtEp), "combine": flat(routing.combine_GtEp)}
    empty = jnp.zeros((num_tokens, num_experts), routing.gate_N.dtype)

    def add(z):
        return empty.at[routing.token_N, routing.expert_index_N].add(z, mode="drop")

    result = {"gates": add(routing.gate_N), "hits": add(jnp.ones_like(routing.gate_N))}
    return result if routing.copy_T is None else result | {"copy": routing.copy_T}


def by_group(listed, devices=1, group_tokens=GROUP_ROWS * S, num_experts=E):
    """{group:

    [(token, expert)]} of the assignments that go somewhere, in order of priority; the devices'
    lists one after another.
    """
    groups: dict = {}
    if not listed:
        return groups
    token, expert, order = (None if z is None else z.reshape(devices, -1) for z in listed)
    local = B * S // devices
    for i in range(devices):
        for n in range(token.shape[1]) if order is None else order[i]:
            if expert[i, n] < num_experts:
                pair = (int(token[i, n]) + i * local, int(expert[i, n]))
                groups.setdefault(pair[0] // group_tokens, []).append(pair)
    return groups


def compiled(function):
    """Jits without the backend's optimiser: a tiny program that runs a few times is compilation."""
    return jax.jit(function, compiler_options=QUICK)
