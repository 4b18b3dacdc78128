"""A run that stopped half-way, without the training: its state is drawn."""

import jax
import meshes
import numpy as np
import run_cases
import tiny

from moe_jax import checkpoint, config, train_step
from moe_jax.begin import begin
from moe_jax.checkpoint import flat
from moe_jax.config import config_file
from moe_jax.data.tokenizer import bytes_tokenizer
from moe_jax.surgery import snapshot
from moe_jax.surgery.snapshot import Snapshot
from moe_jax.tasks import TASKS

STEP = 2


def write(workdir, changes):
    """Writes a run at step STEP of 4, with moments and biases as they might be."""
    changes = {**run_cases.SMALL, "train.steps": 4, **changes}
    raw, cfg = tiny.raw(changes), tiny.build((1, 1, 1), changes)
    rng = np.random.default_rng(0)
    arrays = snapshot.fresh(cfg)
    for name, x in arrays.items():
        of_training = name.startswith(("opt_state/", "router_state/", "ema/"))
        if of_training and np.issubdtype(x.dtype, np.floating):
            change = 0.1 * rng.normal(size=x.shape)
            # Means of squares are not negative.
            arrays[name] = np.abs(x + change) if "/nu/" in name else x + change
        if name == "step" or name.endswith("/count"):
            arrays[name] = np.asarray(STEP, x.dtype)
    data = TASKS[cfg.task].open(cfg)
    snapshot.write(workdir, Snapshot(raw, arrays, STEP, {"data": data.fingerprint}))
    bytes_tokenizer().save(workdir / "tokenizer")
    return workdir


def goes_on(workdir):
    """The arrays of a run by their names, after the steps that are left: it begins as
    `moe_jax.main --config WORKDIR/config.py --workdir WORKDIR` does.
    """
    raw = config_file.read(workdir / "config.py")
    cfg = config.build(raw, 1)
    with jax.set_mesh(meshes.make(1, 1, 1)):
        model = train_step.make_model(cfg.model)
        init = train_step.initial(cfg, model)
        abstract = jax.eval_shape(init, jax.random.key(cfg.seed))
        saves = checkpoint.Checkpoints(workdir / "checkpoints", every=0, keep=1, keep_best=0)
        metadata = {"config": raw, "data": TASKS[cfg.task].open(cfg).fingerprint}
        state, _ = begin(cfg, saves, metadata, init, abstract)
        tx = train_step.make_tx(cfg, abstract.params)
        step_fn = jax.jit(train_step.make_step(cfg, model, tx))
        assert int(state.step) == STEP
        for step in range(STEP, cfg.train.steps):
            state, values = step_fn(state, tiny.put(cfg, tiny.batch(cfg, step)))
            assert np.isfinite(values["loss"])
        # As on disk: layers by themselves.
        return flat.unstack(flat.flatten(jax.device_get(state)), cfg.model.scan)
