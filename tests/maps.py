"""A task in which experts must specialise: inputs come from C clusters, and each cluster has its own linear map.

    x = (2 x one-hot cluster, 1, z),  z ~ N(0, I);    target = (0, 0, A_c z + noise),  A_c orthogonal

The loss is the mean squared error per coordinate of A_c z. Known: `right`, the loss of the right assignment (the variance of the noise), and
`linear`, the least loss of one linear map for all clusters (by least squares on many samples). A dense network of the active width is
trained beside them. score = (linear - loss) / (linear - right): 0 is the best linear map, 1 the right assignment.

Shapes: B rows, S tokens of a row, T = B S, C clusters, Z width of z, D = C + 1 + Z model.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import router_cases
from flax import nnx

from moe_jax import mesh
from moe_jax.config import Options
from moe_jax.models.layers import FeedForward
from moe_jax.moe import load, losses
from moe_jax.moe.layer import Batch, MoE, MoELayer
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import RouterCfg
from moe_jax.weights import RouterState

C, Z, B, S, E, HIDDEN = 8, 7, 8, 32, 8, 32
D = C + 1 + Z
NOISE = 0.1  # standard deviation
STEPS, RATE = 400, 2e-2
VOCAB = 64


def maps():
    """A [C, Z, Z], orthogonal and random."""
    return np.linalg.qr(np.random.default_rng(0).normal(size=(C, Z, Z)))[0].astype(np.float32)


def sample(key):
    """(x [B, S, D], target [B, S, Z])."""
    keys = jax.random.split(key, 3)
    cluster = jax.random.randint(keys[0], (B, S), 0, C)
    z = jax.random.normal(keys[1], (B, S, Z))
    x = jnp.concatenate([2 * jax.nn.one_hot(cluster, C), jnp.ones((B, S, 1)), z], -1)
    target = jnp.einsum("BSij,BSj->BSi", jnp.asarray(maps())[cluster], z)
    return x, target + NOISE * jax.random.normal(keys[2], target.shape)


def linear_loss():
    """The loss of the best linear map of x, by least squares on 16 thousand samples, on as many others."""
    draw = lambda first: [np.concatenate(z) for z in zip(*(flat(sample(jax.random.key(first + i))) for i in range(64)))]
    (x, y), (x_new, y_new) = draw(0), draw(1000)
    return float(np.square(x_new @ np.linalg.lstsq(x, y, rcond=None)[0] - y_new).mean())


def flat(pair):
    return [np.asarray(z).reshape(B * S, -1) for z in pair]


def config(router, **options):
    own = router_cases.base.get_config().model.moe.routers[router].to_dict() | options
    dispatcher = "slots" if router == "soft" else "dropless"
    return MoE(
        num_experts=E,
        group_rows=1,
        router=router,
        router_options=Options(own),
        ordering="token_major",
        ordering_options=Options(),
        adaptive=Options(rate=0.0),
        vocab_size=VOCAB,
        dispatcher=dispatcher,
        dispatcher_options=Options(buffer=0.0) if dispatcher == "dropless" else Options(),
        d_model=D,
        expert_hidden=HIDDEN,
        activation="swiglu",
        param_dtype="float32",
        dtype="float32",
        out_std=HIDDEN**-0.5,
    )


def batch_of(key):
    """What a router may read beside x: ids and positions tell nothing of the cluster."""
    ids = jax.random.randint(key, (B, S), 0, VOCAB)
    position = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    return Batch(ids, position, jnp.ones((B, S), jnp.int32), jnp.arange(B, dtype=jnp.int32))


def coefficients(cfg):
    """Those of configs/base.py; ReLU routing balances by itself."""
    given = router_cases.base.get_config().model.moe.losses.to_dict()
    return {name: value for name, value in given.items() if value and cfg.router != "relu"}


def train_moe(cfg, seed=0):
    """The loss of an MoE layer alone after STEPS steps of Adam: the mean of the last fiftieth of steps, on fresh samples."""
    with jax.set_mesh(mesh.make({}, jax.devices()[:1])):
        layer = MoELayer(jax.random.key(seed), cfg)
        graph, params, state = nnx.split(layer, nnx.Param, RouterState)
        router_cfg = RouterCfg(E, cfg.router_options, 1, VOCAB, lambda z: z)

        def loss(params, state, key):
            x, target = sample(key)
            y, sums = nnx.merge(graph, params, state)(x, batch_of(key), key, True)
            totals = load.totals({name: z[None] for name, z in sums.items()})
            error = jnp.square(y[..., -Z:] - target).mean()
            return error + losses.auxiliary(totals, coefficients(cfg))[0], (error, totals)

        def update(state, totals):
            old = nnx.to_pure_dict(state)["state"] if jax.tree.leaves(state) else {}
            new = ROUTERS[cfg.router].update(old, {name: z[0] for name, z in totals.items()}, router_cfg)
            if old:
                nnx.replace_by_pure_dict(state, {"state": dict(new)})
            return state

        return optimise(loss, params, state, update)


def train_dense(hidden, seed=0):
    """The same for one dense network of that hidden width."""
    with jax.set_mesh(mesh.make({}, jax.devices()[:1])):
        graph, params = nnx.split(FeedForward(jax.random.key(seed), D, hidden, "swiglu", hidden**-0.5, "float32"))

        def loss(params, state, key):
            x, target = sample(key)
            error = jnp.square(nnx.merge(graph, params)(x)[..., -Z:] - target).mean()
            return error, (error, {})

        return optimise(loss, params, {}, lambda state, totals: state)


def optimise(loss, params, state, update):
    tx = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def step(carry, key):
        params, state, moments = carry
        gradient, (error, totals) = jax.grad(loss, has_aux=True)(params, state, key)
        changes, moments = tx.update(gradient, moments, params)
        return (optax.apply_updates(params, changes), update(state, totals), moments), error

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[1])
    errors = run((params, state, tx.init(params)), jax.random.split(jax.random.key(99), STEPS))
    return float(errors[-STEPS // 50 :].mean())


@functools.cache
def floors():
    """(linear, right): the losses of score 0 and score 1."""
    return linear_loss(), NOISE**2


def score(loss):
    linear, right = floors()
    return (linear - loss) / (linear - right)
