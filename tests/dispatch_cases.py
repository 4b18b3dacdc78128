"""Dispatchers against the NumPy oracle in float64, forward and gradient, under hostile routings.

The routing is data, so that one compiled program per mesh serves all cases: the program runs all
variants at once. A variant is a name -> (dispatcher, options), or with
a number of chunks behind them.
"""

import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import oracle

from moe_jax.moe.dispatch import DISPATCHERS, chunks
from moe_jax.moe.dispatch.contract import Experts
from moe_jax.moe.dispatch.layout import Shape
from moe_jax.moe.experts import direct
from moe_jax.moe.experts.grouped_matmul import expert_ffn
from moe_jax.moe.experts.network import Chosen
from moe_jax.moe.routing.contract import Routing
from moe_jax.parallel.mesh import BATCH, P, spec

B, S, D, F, E, K = 8, 4, 16, 16, 8, 2
FACTOR = 1.0


def routings(num_experts, k):
    """{name:

    (expert_BSK, gate_BSK, valid_BS)}: experts of a token are distinct, as every router's are.
    """
    rng = np.random.default_rng(0)

    def distinct(shape):
        return np.argsort(rng.random((*shape, num_experts)), -1)[..., :k]

    gates = rng.random((B, S, k))
    valid = np.ones((B, S), bool)
    tail = valid.copy()
    tail[-1, 1:] = tail[2, 3:] = False
    tail[5] = False  # a whole row of padding
    few = np.argsort(rng.random((B, S, max(k, num_experts // 2))), -1)[..., :k]
    one = np.broadcast_to(np.arange(k), (B, S, k))
    skewed = np.where(rng.random((B, S, 1)) < 0.8, one, distinct((B, S)))
    return {
        "random": (distinct((B, S)), gates, valid),
        "padded tail": (distinct((B, S)), gates, tail),
        "half of the experts without tokens": (few, gates, valid),
        "all tokens to the same experts": (one, gates, valid),
        "all tokens to the last experts": (num_experts - 1 - one, gates, tail),
        "skewed": (skewed, gates, tail),
        "zero gates": (distinct((B, S)), gates * (rng.random((B, S, k)) < 0.5), valid),
        "nothing but padding": (distinct((B, S)), gates, np.zeros_like(valid)),
    }


def on_device(x, expert, gate, valid, w_in, w_out, *, variant, num_experts, activation):
    b, s, d = x.shape
    k = expert.shape[-1]
    dispatcher, options, *num_chunks = variant
    w_in = jax.lax.all_gather(w_in, "data", axis=1, tiled=True)
    w_out = jax.lax.all_gather(w_out, "data", axis=2, tiled=True)
    expert = jnp.where(valid[:, :, None], expert, num_experts)
    token = jnp.repeat(jnp.arange(b * s, dtype=jnp.int32), k)

    def flat(z):
        return z.reshape(-1)

    routing = Routing(
        token, flat(expert), flat(jnp.where(valid[:, :, None], gate, 0)), {}, per_token=k
    )
    shape = Shape(num_experts, b * s, b * s * k, b * s * k, k, s, jax.lax.axis_size("expert"))

    def grouped(x, g, start, size, block):
        return expert_ffn(x, g, start, size, w_in, w_out, activation=activation, block=block)

    def few(*assignments):
        return direct.direct_ffn(*assignments, w_in, w_out, chosen=Chosen(activation))

    y, dropped = chunks.dispatched(
        DISPATCHERS[dispatcher],
        *(x.reshape(-1, d), routing, Experts(grouped, few)),
        shape=shape,
        options=options,
        num_chunks=num_chunks[0] if num_chunks else 1,
    )
    return jax.lax.psum(y, ("model", "seq")).reshape(x.shape), dropped.reshape(expert.shape)


def program(variants, num_experts, activation):
    """(x, gate, w_in, w_out, expert, valid, dy) -> {variant:

    (y, dropped, gradients)} in one compilation.
    """
    row = P(BATCH)
    in_specs = (
        row,
        row,
        row,
        row,
        spec("experts", "expert_embed", None, "hidden"),
        spec("experts", "hidden", "expert_embed"),
    )

    def run(x, gate, w_in, w_out, expert, valid, dy):
        result = {}
        for name, variant in variants.items():
            body = functools.partial(
                on_device, variant=variant, num_experts=num_experts, activation=activation
            )
            layer = jax.shard_map(body, in_specs=in_specs, out_specs=(row, row))

            def loss(x, gate, w_in, w_out, layer=layer):
                y, dropped = layer(x, expert, gate, valid, w_in, w_out)
                return (y * dy).sum(), (y, dropped)

            grads, (y, dropped) = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(
                x, gate, w_in, w_out
            )
            result[name] = (y, dropped, grads)
        return result

    return jax.jit(run)


def forward(variant, num_experts=E, k=K):
    """The compiled forward pass of one variant on the current mesh."""
    rng = np.random.default_rng(0)
    expert, gate, valid = routings(num_experts, k)["random"]
    arrays = (rng.normal(size=(B, S, D)), expert.astype(np.int32), gate, valid)
    rows = tuple(meshes.put(z, "batch") for z in arrays)
    w_in = meshes.put(
        rng.normal(size=(num_experts, D, 1, F)), "experts", "expert_embed", None, "hidden"
    )
    w_out = meshes.put(rng.normal(size=(num_experts, F, D)), "experts", "hidden", "expert_embed")
    body = functools.partial(on_device, variant=variant, num_experts=num_experts, activation="gelu")
    in_specs = tuple(z.sharding.spec for z in (*rows, w_in, w_out))
    layer = jax.shard_map(body, in_specs=in_specs, out_specs=(P(BATCH), P(BATCH)))
    return jax.jit(layer).lower(*rows, w_in, w_out).compile()


def check(variants, shape, num_experts=E, k=K, parts=2):
    """Holds all variants to the oracle on a mesh; returns the worst deviations."""
    rng = np.random.default_rng(1)
    x, dy = rng.normal(size=(2, B, S, D))
    w_in = rng.normal(size=(num_experts, D, parts, F)) / 4
    w_out = rng.normal(size=(num_experts, F, D)) / 4
    worst = {}
    with jax.set_mesh(meshes.make(*shape)):
        run = program(variants, num_experts, "swiglu" if parts == 2 else "gelu")
        weights = (
            meshes.put(w_in, "experts", "expert_embed", None, "hidden"),
            meshes.put(w_out, "experts", "hidden", "expert_embed"),
        )

        def row(z):
            return meshes.put(z, "batch")

        for case, (expert, gate, valid) in routings(num_experts, k).items():
            got = run(
                row(x), row(gate), *weights, row(expert.astype(np.int32)), row(valid), row(dy)
            )
            for variant, (y, dropped, grads) in jax.device_get(got).items():
                factor = FACTOR if variants[variant][0] == "capacity" else None

                def flat(z):
                    return z.reshape(B * S, *z.shape[2:])

                kept = oracle.served(flat(expert), flat(valid), num_experts, S, factor)
                assignments = [(t, flat(expert)[t, j], flat(gate)[t, j]) for t, j in kept]
                want_y, dx, dgates, dw_in, dw_out = oracle.experts(
                    flat(x), assignments, w_in, w_out, flat(dy)
                )
                dgate = np.zeros((B * S, k))
                lost = np.broadcast_to(flat(valid)[:, None], (B * S, k)).copy()
                for (t, j), value in zip(kept, dgates, strict=True):
                    dgate[t, j], lost[t, j] = value, False
                np.testing.assert_array_equal(
                    flat(dropped), lost, err_msg=f"{case}, {variant}: other tokens dropped"
                )
                pairs = {
                    "y": (flat(y), want_y),
                    "x": (flat(grads[0]), dx),
                    "gate": (flat(grads[1]), dgate),
                }
                pairs |= {"w_in": (grads[2], dw_in), "w_out": (grads[3], dw_out)}
                for name, (have, want) in pairs.items():
                    deviation = np.abs(have - want).max()
                    worst[name] = max(worst.get(name, 0), deviation)
                    assert deviation < 1e-10, f"{case}, {variant}: {name} deviates by {deviation}"
    return worst
