"""A small model of every kind, with a batch: for test_models_kinds.py and test_kinds_rules.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import tiny

from moe_jax.models import MODELS
from moe_jax.models.functions import make_model
from moe_jax.moe import load, losses
from moe_jax.moe.layer import Batch
from moe_jax.moe.routing import ROUTERS

B, S, T, P = 8, 6, 5, 3  # rows, tokens, source tokens, width of a vector
ONE = (1, 1, 1)


def config(kind, options=None, model=None, moe=None):
    """The ModelConfig of a kind with some options of its own, some keys of the model, and some of
    its experts.
    """
    cfg = tiny.build(changes=model).model
    moe_cfg = dataclasses.replace(cfg.moe, **(moe or {}))
    return dataclasses.replace(
        cfg, kind=kind, kind_options=MODELS[kind].options(**(options or {})), moe=moe_cfg
    )


MULTI = {"router": "multi_gate", "router_options": ROUTERS["multi_gate"].options(num_gates=3)}
NOISY = {"router": "noisy_top_k", "router_options": ROUTERS["noisy_top_k"].options()}
PATTERN = {"model.prefix": ("dense",), "model.repeats": 1, "model.dropout": 0.2}
CASES = {
    "encoder": lambda: config(
        "encoder", {"num_classes": 3, "head_dropout": 0.1, "token_dropout": 0.2}, PATTERN, NOISY
    ),
    "encoder of vectors": lambda: config(
        "encoder",
        {"inputs": "vectors", "input_dim": P, "pool": "max", "learned_positions": S},
        {"model.repeats": 1},
    ),
    "encdec": lambda: config(
        "encdec", {"encoder_repeats": 2}, {"model.dropout": 0.2, "model.repeats": 1}
    ),
    "prefix": lambda: config("decoder", {"bidirectional_prefix": True}, {"model.repeats": 1}),
    "mmoe": lambda: config(
        "mmoe",
        {"items": (7, 4, 2), "item_dropout": 0.3},
        {"model.dropout": 0.2, "model.repeats": 1},
        MULTI,
    ),
    "article": lambda: config("article", {"window": 4}),
    "article, a class": lambda: config(
        "article", {"window": 9, "num_classes": 3, "aggregate": "gated"}
    ),
}
close = functools.partial(np.testing.assert_allclose, rtol=0)


def tokens(rng, length, lengths):
    """A Batch of rows with so many tokens each."""
    place = np.broadcast_to(np.arange(length, dtype=np.int32), (B, length))
    there = place < np.asarray(lengths)[:, None]
    ids = rng.integers(1, 64, (B, length)).astype(np.int32)
    return Batch(ids, place, there.astype(np.int32), np.arange(B, dtype=np.int32) + 50)


def inputs(name, seed=0):
    """Returns a batch with rows of several lengths, one without any token, one without source."""
    rng = np.random.default_rng(seed)
    batch = tokens(rng, S, [6, 3, 1, 0, 6, 2, 5, 4])
    if name == "encoder of vectors":
        return batch._replace(vectors_BSP=rng.normal(size=(B, S, P)))
    if name == "encdec":
        return batch._replace(source_rows=tokens(rng, T, [5, 1, 0, 3, 2, 5, 4, 5]))
    if name == "prefix":
        return batch._replace(
            prefix_BS=np.arange(S)[None] < np.array([2, 3, 0, 0, 4, 1, 5, 1])[:, None]
        )
    if name == "mmoe":
        weight = rng.random((B, 5)) * (rng.random((B, 5)) < 0.7)
        weight[3] = 0
        feature = rng.integers(0, 64, (B, 5)).astype(np.int32)
        return batch._replace(feature_BL=feature, feature_weight_BL=weight)
    return batch


def put(batch):
    return jax.tree.map(lambda z: meshes.put(z, "batch"), batch)


class Run:
    """A model of a kind on a mesh with random parameters."""

    def __init__(self, cfg, shape=ONE):
        self.cfg, self.mesh = cfg, meshes.make(*shape)
        with jax.set_mesh(self.mesh):
            self.model = make_model(cfg)
            self.params, self.router_state = jax.jit(self.model.init)(jax.random.key(0))
            self.run = jax.jit(
                lambda p, r, b, train: self.model.bind(p, r)(b, jax.random.key(3), train),
                static_argnums=3,
            )

            # what begins at zero or one is moved, so that nothing is special
            def odd(path, z):
                return z + 0.1 * jnp.sin(jnp.arange(z.shape[-1])) if "bias" in str(path) else z

            self.params = jax.jit(functools.partial(jax.tree_util.tree_map_with_path, odd))(
                self.params
            )

    def __call__(self, batch, train=False):
        """(logits, sums) as NumPy arrays."""
        with jax.set_mesh(self.mesh):
            return jax.device_get(self.run(self.params, self.router_state, put(batch), train))

    def value_and_gradient(self, batch):
        """Returns (logits, sums, gradient) of a smooth function of logits and balance losses."""

        def value(params, batch):
            logits, sums = self.model.bind(params, self.router_state)(
                batch, jax.random.key(3), True
            )
            extra = (
                losses.auxiliary(load.totals(sums), {"balance": 0.5, "z": 0.1})[0] if sums else 0.0
            )
            wave = jnp.sin(jnp.arange(logits.size)).reshape(logits.shape)
            place = jax.typeof(logits).sharding
            return (jnp.sin(logits) * jax.sharding.reshard(wave, place)).sum() + extra, (
                logits,
                sums,
            )

        with jax.set_mesh(self.mesh):
            run = jax.jit(jax.grad(value, has_aux=True))
            gradient, (logits, sums) = jax.device_get(run(self.params, put(batch)))
        return logits, sums, gradient


@functools.cache
def alone(name):
    return Run(CASES[name]())


@functools.cache
def alone_gradient(name):
    return alone(name).value_and_gradient(inputs(name))


def assert_alike(got, want, atol):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: close(a, b, atol=atol), got, want)
