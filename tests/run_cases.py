"""A small run in a directory, and the losses that it wrote."""

import time

import jax
import meshes
import tiny

from moe_jax import train
from moe_jax.parallel.mesh import WRITTEN
from moe_jax.report.metrics import read_rows

SMALL = {
    "model.vocab_size": 256,
    "model.repeats": 1,
    "model.dropout": 0.1,
    "data.sources": (("embedded:verse", 1.0),),
    "data.slice_bytes": 20_000,
    "data.heldout_bytes": 2_000,
    "data.seq_len": 32,
    "train.steps": 10,
    "train.batch_size": 8,
    "optim.warmup_steps": 2,
    "optim.ema_decay": 0.5,
    "eval.every": 0,
    "eval.batches": 1,
    "eval.final_batches": 1,
    "eval.sample_tokens": 0,
    "checkpoint.every": 0,
    "log.every": 1,
    "log.tensorboard": False,
    "mesh.data": 1,
}


def run(workdir, changes=None, shape=(1, 1, 1)):
    axes = {f"mesh.{axis}": length for axis, length in zip(WRITTEN, shape, strict=True)}
    raw = tiny.raw(SMALL | axes | (changes or {}))
    cfg = tiny.build(shape, SMALL | axes | (changes or {}))
    with jax.set_mesh(meshes.make(*shape)):
        return train.run(cfg, raw, workdir, time.monotonic())


def losses(workdir):
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if "train/loss" in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row["train/loss"] for row in rows}
