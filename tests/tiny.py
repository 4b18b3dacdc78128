"""Tiny configs, batches and one-step programs that several tests share."""

import json
from types import SimpleNamespace

import jax
import meshes
import numpy as np

from configs import base
from moe_jax import config, train_step
from moe_jax.data.batches import PackedText
from moe_jax.moe.layer import Batch
from moe_jax.parallel import batch_rows
from moe_jax.parallel.mesh import WRITTEN

TINY = {
    "model.vocab_size": 64,
    "model.d_model": 16,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_hidden": 32,
    "model.repeats": 2,
    "model.moe.expert_hidden": 16,
    "model.param_dtype": "float64",
    "model.dtype": "float64",
    "train.batch_size": 16,
    "train.steps": 100,
    "data.seq_len": 8,
}


# Of a language model, as far as an evaluation asks: one domain, every token one byte.
DATA = SimpleNamespace(
    domains=("all",), tokenizer=SimpleNamespace(vocab_size=64, token_bytes=lambda: np.ones(64, int))
)


def raw(changes=None):
    """A nested dict of JSON values, as train.py saves it."""
    c = base.get_config()
    with c.unlocked():
        c.update_from_flattened_dict({**TINY, **(changes or {})})
    return json.loads(json.dumps(c.to_dict()))


def build(shape=(1, 1, 1), changes=None, devices=None):
    """A config on a mesh data x expert x model; `devices`: where `changes` has more axes."""
    axes = {f"mesh.{axis}": length for axis, length in zip(WRITTEN, shape, strict=True)}
    return config.build(raw({**axes, **(changes or {})}), devices or int(np.prod(shape)))


def batch(cfg, step=0):
    """Random tokens with two packed documents in each row and a padded tail in some; NumPy, the
    same on every mesh.
    """
    rng = np.random.default_rng(step)
    num, length = cfg.train.batch_size, cfg.data.seq_len
    tokens = rng.integers(0, cfg.model.vocab_size, (num, length + 1)).astype(np.int32)
    cut = rng.integers(1, length, (num, 1))
    place_S = np.arange(length)[None]
    segment = np.where(place_S < cut, 1, 2)
    segment[:: num // 4 or 1, length - 2 :] = 0
    position = np.where(place_S < cut, place_S, place_S - cut)
    arrays = (tokens[:, :-1], tokens[:, 1:], segment, position, np.zeros_like(segment))
    return PackedText(*(a.astype(np.int32) for a in arrays), np.arange(num, dtype=np.int32))


def put(cfg, local):
    return batch_rows.put(local, np.arange(cfg.train.batch_size), cfg.train.batch_size)


def first_logits(changes, id_BS):
    """The logits of whole rows in a model that has its first parameters, on one device."""
    B, S = id_BS.shape
    place_BS = np.tile(np.arange(S, dtype=np.int32), (B, 1))
    parts = {"id_BS": id_BS, "position_BS": place_BS, "segment_BS": np.ones_like(place_BS)}
    with jax.set_mesh(meshes.make(1, 1, 1)):
        model = train_step.make_model(build(changes=changes).model)
        placed = {name: meshes.put(z, "batch") for name, z in parts.items()}
        rows = Batch(**placed, row_B=meshes.put(np.arange(B, dtype=np.int32), "batch"))

        @jax.jit
        def logits():
            bound = model.bind(*model.init(jax.random.key(0)))
            return bound(rows, jax.random.key(0), False)[0]

        return np.asarray(logits())


class Program:
    """A model on a mesh: its first state and its jitted step. Enter it to set the mesh."""

    def __init__(self, shape, changes=None):
        self.cfg = build(shape, changes)
        self.mesh = meshes.make(*shape)
        with jax.set_mesh(self.mesh):
            self.model = train_step.make_model(self.cfg.model)
            self.init = jax.jit(train_step.initial(self.cfg, self.model))
            abstract = jax.eval_shape(self.init, jax.random.key(0))
            self.step = jax.jit(
                train_step.make_step(
                    self.cfg, self.model, train_step.make_tx(self.cfg, abstract.params)
                )
            )

    def run(self, steps, first=None, begin=0):
        """(state, [metrics of each step])."""
        with jax.set_mesh(self.mesh):
            now, rows = first if first is not None else self.init(jax.random.key(self.cfg.seed)), []
            for step in range(begin, begin + steps):
                now, metrics = self.step(now, put(self.cfg, batch(self.cfg, step)))
                rows.append(jax.device_get(metrics))
        return now, rows
