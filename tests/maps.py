"""A task in which experts must specialise: inputs come from C clusters, and each cluster has its
own linear map into its own subspace.

    x = (2 x one-hot cluster, 1, z, 0);  z ~ N(0, I_Z);  target = A_c z in R^D,  D = C Z;  the
    columns of all A_c are orthonormal

The loss is the mean squared error per coordinate. Known without training:

    right assignment   0: an expert of hidden width Z computes A_c z exactly (the coordinate that
    is 1 makes its gates constant)
    one dense network  its outputs lie in the column space of w_out, so it is at best the projection
    of the target on the H largest
                       principal directions (H hidden units, any activation). The covariance is I /
                       C: at least (D - H) / (C D).

score = 1 - loss / that floor, with H the active hidden width (2 experts): 0 is what no dense
network of equal active size surpasses, 1 is the right assignment.

Shapes: B rows, S tokens of a row, C clusters, Z width of z, D = C Z model, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import router_cases
from flax import nnx

from configs import base
from moe_jax.models.layers import FeedForward
from moe_jax.moe import load, losses
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.experts.network import Chosen
from moe_jax.moe.layer import Batch, MoELayer
from moe_jax.moe.ordering import ORDERINGS
from moe_jax.moe.probe import Request
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import RouterCfg
from moe_jax.moe.settings import MoE
from moe_jax.parallel import mesh
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.schema.config import AdaptiveConfig, StoredConfig
from moe_jax.weights import RouterState

C, Z, B, S, E, HIDDEN = 8, 4, 8, 16, 8, 4
D = C * Z
ACTIVE = 2  # experts per token, of most routers
STEPS, RATE = 400, 2e-2
VOCAB = 64


def maps():
    """A [C, D, Z]."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]
    return q.reshape(D, C, Z).swapaxes(0, 1).astype(np.float32)


def floor(hidden):
    """The least loss of any dense network of that hidden width, from the principal directions of
    the target (Eckart and Young 1936).
    """
    covariance = np.einsum("cij,ckj->ik", maps(), maps()) / C
    return float(np.linalg.eigvalsh(covariance)[: D - hidden].sum() / D)


def score(loss):
    return 1 - loss / floor(ACTIVE * HIDDEN)


def sample(key):
    """(x [B, S, D], target [B, S, D], cluster [B, S])."""
    keys = jax.random.split(key)
    cluster = jax.random.randint(keys[0], (B, S), 0, C)
    z = jax.random.normal(keys[1], (B, S, Z))
    x = jnp.concatenate(
        [2 * jax.nn.one_hot(cluster, C), jnp.ones((B, S, 1)), z, jnp.zeros((B, S, D - C - 1 - Z))],
        -1,
    )
    target = jnp.einsum("BSij,BSj->BSi", jnp.asarray(maps())[cluster], z)
    return jax.tree.map(lambda z: jax.sharding.reshard(z, P(BATCH)), (x, target, cluster))


def config(router, **options):
    options |= {"k": 1} if router == "recorded" else {}
    dispatcher = "slots" if router == "soft" else "dropless"
    return MoE(
        num_experts=E,
        group_rows=1,
        router=router,
        router_options=ROUTERS[router].options(**options),
        ordering="token_major",
        ordering_options=ORDERINGS["token_major"].options(),
        adaptive=AdaptiveConfig(),
        vocab_size=VOCAB,
        dispatcher=dispatcher,
        dispatcher_options=DISPATCHERS[dispatcher].options(),
        d_model=D,
        expert_hidden=HIDDEN,
        activation="swiglu",
        param_dtype="float32",
        dtype="float32",
        out_std=HIDDEN**-0.5,
        stored=StoredConfig(),
    )


def batch_of(key, cluster, router):
    """What a router may read beside x: ids and positions tell nothing of the cluster; a recording
    is the right assignment.
    """
    ids = jax.random.randint(key, (B, S), 0, VOCAB)
    position = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    batch = Batch(ids, position, jnp.ones((B, S), jnp.int32), jnp.arange(B, dtype=jnp.int32))
    batch = jax.tree.map(lambda z: jax.sharding.reshard(z, P(BATCH)), batch)
    if router != "recorded":
        return batch
    one = jnp.ones(1)[None, None] * (cluster >= 0)[:, :, None]
    request = Request((cluster[:, :, None], one))
    return batch._replace(request=request)


def coefficients(cfg):
    """Those of configs/base.py; ReLU routing balances by itself."""
    given = base.get_config().model.moe.losses.to_dict()
    return {name: value for name, value in given.items() if value and cfg.router != "relu"}


def train_moe(cfg, seed=0):
    """The loss of an MoE layer alone after STEPS steps of Adam: the mean of the last fiftieth of
    steps, on fresh samples.
    """
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        layer = MoELayer(jax.random.key(seed), cfg)
        graph, params, state = nnx.split(layer, nnx.Param, RouterState)
        router_cfg = RouterCfg(E, cfg.router_options, 1, VOCAB, lambda z: z)

        def loss(params, state, key):
            x, target, cluster = sample(key)
            y, sums = nnx.merge(graph, params, state)(
                x, batch_of(key, cluster, cfg.router), key, True
            )
            totals = load.totals({name: z[None] for name, z in sums.items()})
            error = jnp.square(y - target).mean()
            return error + losses.auxiliary(totals, coefficients(cfg))[0], (error, totals)

        def update(state, totals):
            old = nnx.to_pure_dict(state)["state"] if jax.tree.leaves(state) else {}
            new = ROUTERS[cfg.router].update(
                old, {name: z[0] for name, z in totals.items()}, router_cfg
            )
            if old:
                nnx.replace_by_pure_dict(state, {"state": dict(new)})
            return state

        return optimise(loss, params, state, update)


def train_dense(hidden, seed=0):
    """The same for one dense network of that hidden width."""
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        graph, params = nnx.split(
            FeedForward(jax.random.key(seed), D, hidden, Chosen("swiglu"), hidden**-0.5, "float32")
        )

        def loss(params, state, key):
            x, target, _ = sample(key)
            error = jnp.square(nnx.merge(graph, params)(x) - target).mean()
            return error, (error, {})

        return optimise(loss, params, {}, lambda state, totals: state)


def optimise(loss, params, state, update):
    tx = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def step(carry, key):
        params, state, moments = carry
        gradient, (error, totals) = jax.grad(loss, has_aux=True)(params, state, key)
        changes, moments = tx.update(gradient, moments, params)
        return (optax.apply_updates(params, changes), update(state, totals), moments), error

    run = router_cases.compiled(lambda carry, keys: jax.lax.scan(step, carry, keys)[1])
    errors = run((params, state, tx.init(params)), jax.random.split(jax.random.key(99), STEPS))
    return float(errors[-STEPS // 50 :].mean())


def main():
    """The table of docs/routers.md: `PYTHONPATH=. python tests/maps.py`."""
    print("| router | loss / floor of a dense network | score |\n| --- | --- | --- |")
    dense, bound = train_dense(ACTIVE * HIDDEN), floor(ACTIVE * HIDDEN)
    print(f"| one dense network of equal active width | {dense / bound:.3f} | {score(dense):.2f} |")
    for router in ROUTERS:
        loss = train_moe(config(router))
        print(f"| {router} | {loss / bound:.3f} | {score(loss):.2f} |", flush=True)


if __name__ == "__main__":
    main()
