"""The routers of router_cases.py inside a whole MoE layer on a mesh, and what the NumPy oracle
makes of the same routing.

Sizes as in router_cases.py; F expert hidden. Capacity is so tight that assignments drop.
"""

import math

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import oracle
import router_cases
from flax import nnx
from router_cases import CASES, GROUP_ROWS, VOCAB, B, D, E, S

from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.layer import Batch, MoELayer
from moe_jax.moe.ordering import ORDERINGS
from moe_jax.moe.probe import Request
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.settings import MoE
from moe_jax.schema.config import AdaptiveConfig, StoredConfig
from moe_jax.weights import RouterState

F, FACTOR = 8, 0.5
OPTIONS = {name: one.options() for name, one in DISPATCHERS.items()}
OPTIONS["capacity"] = DISPATCHERS["capacity"].options(factor=FACTOR)


def dispatchers(case):
    router = CASES[case][0]
    if router == "soft":
        return ["slots"]
    return ["dropless"] if ROUTERS[router].own_capacity else ["capacity", "dropless"]


def config(case, dispatcher):
    return MoE(
        num_experts=E,
        group_rows=GROUP_ROWS,
        router=CASES[case][0],
        router_options=router_cases.options(case),
        ordering="token_major",
        ordering_options=ORDERINGS["token_major"].options(),
        adaptive=AdaptiveConfig(),
        vocab_size=VOCAB,
        dispatcher=dispatcher,
        dispatcher_options=OPTIONS[dispatcher],
        d_model=D,
        expert_hidden=F,
        activation="swiglu",
        param_dtype="float64",
        dtype="float64",
        out_std=1.0,
        stored=StoredConfig(),
    )


def experts():
    """(w_in [E, D, 2, F], w_out [E, F, D], weights of the output [T, D])."""
    rng = np.random.default_rng(5)

    def normal(*shape):
        return rng.normal(size=shape)

    return normal(E, D, 2, F) / 4, normal(E, F, D) / 4, normal(B * S, D)


def run(case, dispatcher, shape, gradient=False):
    """(y [T, D], sums, gradients by x, router and experts or None) of the layer in training mode,
    on a mesh.
    """
    given, (params, state) = router_cases.tokens(case), router_cases.weights(case)
    w_in, w_out, dy = experts()

    def rows(z):
        return z.reshape((B, S) + z.shape[1:])

    with jax.set_mesh(meshes.make(*shape)):

        def split(key):
            return nnx.split(MoELayer(key, config(case, dispatcher)), nnx.Param, RouterState)

        graph, abstract, abstract_state = nnx.eval_shape(split, jax.random.key(0))

        def put(z):
            return meshes.put(rows(z), "batch")

        seen = (put(z) for z in (given.id_T, given.position_T, given.segment_T))
        request = Request(jax.tree.map(put, given.recorded))
        batch = Batch(*seen, meshes.put(given.row_T[::S], "batch"), request)

        def placed(like, values):
            return jax.tree.map(
                lambda z, leaf: jax.device_put(
                    z, jax.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
                ),
                values,
                like,
            )

        weights = {"router": params, "experts": {"w_in": w_in, "w_out": w_out}}
        weights = placed(nnx.to_pure_dict(abstract), {n: w for n, w in weights.items() if w})
        values = placed(nnx.to_pure_dict(abstract_state), {"state": state} if state else {})

        dy_BSD = put(dy)

        def loss(x, weights):
            layer = nnx.merge(graph, filled(abstract, weights), filled(abstract_state, values))
            y, sums = layer(x, batch, jax.random.key(7), True)
            smooth = sum(jnp.sin(sums[name]).sum() for name in ("probs", "importance", "z"))
            return (y * dy_BSD).sum() + smooth, (y, sums)

        program = (
            jax.grad(loss, argnums=(0, 1), has_aux=True)
            if gradient
            else lambda *args: (None, loss(*args)[1])
        )
        gradients, (y, sums) = jax.device_get(
            router_cases.compiled(program)(put(given.x_TD), weights)
        )
    return y.reshape(B * S, D), sums, gradients


def filled(state, values):
    state = jax.tree.map(lambda z: z, state)
    nnx.replace_by_pure_dict(state, values)
    return state


def expected(case, dispatcher, dense, sums, listed):
    """(y, sums) from the routing of the router alone: the first C assignments of an expert in a
    group are served.
    """
    x = router_cases.tokens(case).x_TD
    w_in, w_out, dy = experts()
    if "dispatch" in dense:
        return through_slots(x, dense, w_in, w_out), {**sums, "dropped": np.zeros(B)}
    per_group = len(listed[0]) * GROUP_ROWS // B
    places = max(1, min(math.ceil(FACTOR * per_group / E - 1e-9), GROUP_ROWS * S))
    served, dropped = [], np.array(sums.get("dropped", np.zeros(B)))
    for pairs in router_cases.by_group(listed).values():
        taken = dict.fromkeys(range(E), 0)
        for token, expert in pairs:
            taken[expert] += 1
            if dispatcher == "capacity" and taken[expert] > places:
                dropped[token // S] += 1
            else:
                served.append((token, expert, dense["gates"][token, expert]))
    y = oracle.experts(x, served, w_in, w_out, dy)[0]
    return y + dense.get("copy", np.zeros(len(x)))[:, None] * x, {**sums, "dropped": dropped}


def through_slots(x, dense, w_in, w_out):
    """Soft MoE group by group."""
    y, group = np.zeros_like(x), GROUP_ROWS * S
    for first in range(0, len(x), group):
        own = slice(first, first + group)
        mixed = np.einsum("tep,td->epd", dense["dispatch"][own], x[own])
        h = np.einsum("epd,edcf->epcf", mixed, w_in)
        out = (oracle.sigmoid(h[:, :, 0]) * h[:, :, 0] * h[:, :, 1]) @ w_out
        y[own] = np.einsum("tep,epd->td", dense["combine"][own], out)
    return y
