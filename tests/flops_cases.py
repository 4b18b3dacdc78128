"""A config whose parameters and FLOPs are counted, and the count of its real parameters."""

import collections
import math

import jax
import meshes

from configs import base
from moe_jax import config, train_step
from moe_jax.parallel.mesh import WRITTEN

ONE = (1, 1, 1)


def make_config(shape=ONE, model=None, moe=None, train=None):
    """A Config from the defaults and a few changed keys, on a mesh of that shape."""
    raw = base.get_config().to_dict()
    small = {
        "d_model": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_hidden": 48,
        "vocab_size": 64,
        "repeats": 1,
    }
    raw["model"] |= small | (model or {})
    raw["model"]["moe"] |= {"expert_hidden": 16} | (moe or {})
    raw["mesh"] |= dict(zip(WRITTEN, shape, strict=True))
    raw["data"]["seq_len"], raw["train"]["batch_size"] = 8, 16
    raw["train"] |= train or {}
    raw["optim"] |= {"optimizer": "sgd", "ema_decay": 0.9}
    return config.build(raw, math.prod(shape))


KINDS = {
    "ends/embed": "embedding",
    "ends/head": "head",
    "norm": "norms",
    "attention/weights": "attention",
    "dense": "dense",
    "experts": "experts",
    "router": "router",
}


def counted(cfg):
    """The sizes of the real model's parameters by kind; the feed-forward beside experts is that of
    the shared ones.
    """
    with jax.set_mesh(meshes.make(*ONE)):
        params, _ = jax.eval_shape(train_step.make_model(cfg).init, jax.random.key(0))
    names, sizes = train_step.parameter_names(params), [x.size for x in jax.tree.leaves(params)]
    moe_blocks = {name.partition("/moe/")[0] for name in names if "/moe/" in name}
    total = collections.Counter()
    for name, size in zip(names, sizes, strict=True):
        kind = next(kind for part, kind in KINDS.items() if part in name)
        total[
            "shared" if kind == "dense" and name.partition("/dense/")[0] in moe_blocks else kind
        ] += size
    return total
