"""A tiny language model with NumPy weights on held-out batches, as the instruments take it."""

import jax
import numpy as np
import tiny

from moe_jax.instruments import held_out, replay
from moe_jax.moe import probe
from moe_jax.tasks.lm import task as lm
from moe_jax.train_step import make_model

DATA = {
    "model.vocab_size": 256,
    "model.repeats": 2,
    "model.scan": True,  # one block to compile
    "data.sources": (("embedded:verse,novel", 1.0),),
    "data.slice_bytes": 5_000,
    "data.heldout_bytes": 1_000,
    "data.seq_len": 16,
    "train.batch_size": 16,
    "model.moe.num_experts": 4,
}


def weights(cfg):
    """Parameters and router state from NumPy: nothing is compiled to draw them, and they are the
    same on every mesh.
    """
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(jax.jit(make_model(cfg.model).init), jax.random.key(0))

    def place(s):
        return jax.sharding.NamedSharding(jax.sharding.get_mesh(), s.sharding.spec)

    def draw(s):
        return jax.device_put((0.3 * rng.normal(size=s.shape)).astype(s.dtype), place(s))

    return jax.tree.map(draw, abstract)


def probed(shape=(1, 1, 1), changes=None, num_batches=1):
    """A model on held-out batches; called with the mesh set."""
    cfg = tiny.build(shape, DATA | (changes or {}))
    return held_out.open_run(cfg, lm.open_data(cfg), *weights(cfg), num_batches)


def recorded(run, wanted=probe.ROUTING, request=()):
    inputs = held_out.put_batch(run, run.batches[0])._replace(request=request)
    return held_out.make_record(run.cfg.model, wanted)(run.params, run.router_state, inputs)


def loss(run, params=None, request=()):
    inputs = held_out.put_batch(run, run.batches[0])._replace(request=request)
    return held_out.make_sums(run, run.cfg.model)(params or run.params, run.router_state, inputs)[
        "nll"
    ]


def with_(run, layer, change):
    """The parameters with some of one MoE layer changed:

    `change` of its {"gate", "w_in", "w_out"} gives the new ones.
    """
    params = jax.tree.map(lambda x: x, run.params)
    moe = params["repeats"]["blocks"][0]["moe"]
    found = {name: group[name] for group in (moe["router"], moe["experts"]) for name in group}
    for name, value in change({name: np.array(z[layer]) for name, z in found.items()}).items():
        group = moe["router" if name == "gate" else "experts"]
        stacked = np.array(group[name])
        stacked[layer] = value
        group[name] = jax.device_put(stacked, group[name].sharding)
    return params


def seen(run):
    fields = recorded(run)
    valid = run.batches[0].segment_BS > 0
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), fields["expert"].shape[:3])
    return replay.OwnRouting(fields["expert"], fields["gate"], valid, lambda: probs, 4, rng)
