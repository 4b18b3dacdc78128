"""A tiny language model with NumPy weights on held-out batches, as the instruments take it."""

import jax
import models
import numpy as np

from moe_jax.instruments import held_out
from moe_jax.state import make_model
from moe_jax.tasks import lm

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
    """Parameters and router state from NumPy: nothing is compiled to draw them, and they are the same on every mesh."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(jax.jit(make_model(cfg.model).init), jax.random.key(0))
    place = lambda s: jax.sharding.NamedSharding(jax.sharding.get_mesh(), s.sharding.spec)
    draw = lambda s: jax.device_put((0.3 * rng.normal(size=s.shape)).astype(s.dtype), place(s))
    return jax.tree.map(draw, abstract)


def probed(shape=(1, 1, 1), changes=None, num_batches=1):
    """A model on held-out batches; called with the mesh set."""
    cfg = models.build(shape, DATA | (changes or {}))
    return held_out.open_run(cfg, lm.open_data(cfg), *weights(cfg), num_batches)
