"""A run that stopped half-way, without the training: its state is drawn."""

import numpy as np
import run_cases
import tiny

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
