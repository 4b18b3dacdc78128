"""A small language model to draw from."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from moe_jax import config
from moe_jax.parallel import mesh
from moe_jax.train_step import make_model

CONTEXT = 32


VOCAB = 64  # of the model; the tokenizer has fewer


BOUNDARY = 60


def raw_config(**model):
    """Everything that decoding may trip over: grouped queries, norms, biases, dense and shared
    experts, capacity in training.
    """
    c = base.get_config()
    with c.unlocked():
        c.model.update(
            dict(
                d_model=16, num_heads=4, num_kv_heads=2, ffn_hidden=16, vocab_size=VOCAB, repeats=2
            )
        )
        c.model.update(dict(prefix=("dense",), qk_norm=True, attention_bias=True) | model)
        c.model.moe.update(
            dict(num_experts=4, expert_hidden=16, shared_experts=1, dispatcher="capacity")
        )
        c.data.seq_len = CONTEXT
    return json.loads(json.dumps(c.to_dict()))


def model_config(**model):
    raw = raw_config(**model)
    raw["mesh"] |= {"data": 2, "expert": 2, "model": 2}
    return config.build(raw, 8).model


def one_device():
    return mesh.make(mesh.ONE, jax.devices()[:1])


def values(cfg):
    """Random (params, router state) on the current mesh, drawn by NumPy: compiling the model's own
    draw takes longer than the tests.

    The same values in the layout of scan and without it. The boundary is seldom the likeliest
    token, so that texts are long.
    """
    abstract = jax.eval_shape(
        make_model(dataclasses.replace(cfg, scan=False)).init, jax.random.key(0)
    )
    source = np.random.default_rng(0)
    here = jax.sharding.get_mesh()

    def fill(path, like):
        about_one = "scale" in str(path[-1])
        x = (
            source.normal(size=like.shape).astype(np.float32) * (0.1 if about_one else 0.4)
            + about_one
        )
        if "head" in str(path[-1]):
            x[:, BOUNDARY] = 0
        return jax.device_put(x, jax.NamedSharding(here, like.sharding.spec))

    params, state = jax.tree_util.tree_map_with_path(fill, abstract)
    if cfg.scan:
        layers = [params["repeats"][i] for i in range(cfg.repeats)]
        params = {**params, "repeats": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
    return params, state
