"""A cell that begins from a dense model, which is trained before it and upcycled.

The state of training begins anew: no moments, step 0, a schedule of its own.
"""

import jax
import numpy as np

from moe_jax import config
from moe_jax.checkpoint import flat
from moe_jax.errors import UserError
from moe_jax.study.contract import Cell
from moe_jax.surgery import upcycle
from moe_jax.surgery.snapshot import OF_MODEL, Snapshot
from moe_jax.surgery.upcycling import Change
from moe_jax.train_step import State, advanced, updated

# What is copied: every dense block, exactly, with routers as in a new model.
EVERY_BLOCK, ROUTERS, EXACT = 1, "draw", Change(noise=0.0, drop=0.0, seed=0)


def upcycled(cell: Cell, fresh: State, dense: State) -> State:
    """Returns the first state of a cell: a fresh one with the model of its parent, upcycled.

    Layers are single (model.scan = False). Raises UserError where the cell is another model than
    its parent with experts.

    Args:
      dense: the state at the end of the parent's run.
    """
    assert cell.parent is not None
    raw = dict(cell.parent.raw)
    arrays = {name: np.asarray(x) for name, x in flat.flatten(dense).items()}
    old = Snapshot(raw, arrays, raw["train"]["steps"], {})
    width = cell.raw["model"]["moe"]["expert_hidden"]
    words = [f"--config.{upcycle.WIDTH}={width}"]
    asked = upcycle.Asked(words, EVERY_BLOCK, ROUTERS, EXACT, moments=0.0, restart=True)
    made = upcycle.upcycled(old, asked).snapshot
    cfg = config.build(dict(cell.raw), 1)
    if made.config.model != cfg.model:
        raise UserError(
            f"the arm {cell.arm} is another model than its parent with experts: give both the "
            "same keys of the model but for model.period"
        )
    like = dict(zip(OF_MODEL, (updated(fresh), fresh.router_state), strict=True))
    parts = {}
    for part, tree in like.items():
        names = {
            name: jax.device_put(made.arrays[f"{part}/{name}"].astype(x.dtype), x.sharding)
            for name, x in flat.flatten(tree).items()
        }
        parts[part] = flat.unflatten(names, tree)
    fresh = fresh._replace(router_state=parts["router_state"])
    return advanced(cfg, fresh, parts["params"])
