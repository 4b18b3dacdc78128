"""Held-out figures, weighted by prediction, on fixed batches."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from moe_jax.data.batches import eval_batches
from moe_jax.data.contract import Data
from moe_jax.models import depth, mtp
from moe_jax.models.decodable import with_dispatcher
from moe_jax.moe import load
from moe_jax.parallel.batch_rows import local_rows, put
from moe_jax.parallel.mesh import P
from moe_jax.runtime import stopping
from moe_jax.schema.config import Config
from moe_jax.tasks import TASKS, contract
from moe_jax.train_step import State, judged, make_model

# Rows whose routing is kept, for what chance gives: one of each domain in turn, so they stand for
# all.
MOST_ROWS = 4096


def make_evaluate(cfg: Config, data: Data) -> Callable[[State, int], dict[str, Any]]:
    """Returns a function: (state, number of batches, 0 = all) -> a dict of the held-out figures.

    It is compiled once, at first use.

    The figures of the task (tasks/NAME.py, `summary`; "loss" is one of them), "max_vio" (of all
    held-out tokens, mean over MoE layers), "moe" (load figures of each layer), "routing" (counts of
    assignments per MoE layer, domain and expert [L, Z, E]), "rows" (nats and tokens of each row
    that was evaluated, in data.heldout_order()), "row_routing" (of the first MOST_ROWS rows the
    domain [R] and the assignments [R, L, E]).

    The last batch is filled up with padding, which counts nowhere; sums are added up in float64, so
    the result does not depend on how the rows fall into batches. Evaluates the moving average of
    the parameters where there is one. Raises stopping.Interrupted between two batches.
    """
    model_cfg = cfg.model
    if cfg.eval.dispatcher != "same":
        # With "dropless" the loss of a row does not depend on the rows that share its batch.
        model_cfg = with_dispatcher(model_cfg, cfg.eval.dispatcher)
    model, task = make_model(model_cfg), TASKS[cfg.task]

    @jax.jit
    def sums_of(params: Any, router_state: Any, batch: Any) -> Any:
        sums = contract.evaluate(task, model.bind(params, router_state), batch, data)
        return jax.sharding.reshard(sums, P())

    def evaluate(state: State, num_batches: int) -> dict[str, Any]:
        params = judged(state)
        size = cfg.eval.batch_size
        rows = local_rows(size)
        total: Any = None
        # Of each batch the rows' nats, and of the first `most` batches their routing.
        seen, routed = [], []
        most = math.ceil(MOST_ROWS / size)
        for batch in eval_batches(data, size, num_batches or None, rows):
            stopping.check()
            sums = sums_of(params, state.router_state, put(batch, rows, size))
            # Added up on the host in float64: so many terms would be rounded in float32.
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
            seen.append(sums.pop("rows"))
            routed.append(sums.pop("row_routing"))
            del routed[most:]
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        many = len(data.heldout_order()[1])

        def joined(*parts):
            # The last batch may be filled up with padding, which comes last.
            return np.concatenate(parts)[:many]

        found = {"rows": jax.tree.map(joined, *seen), "row_routing": jax.tree.map(joined, *routed)}
        return summary(task, total, data) | found

    return evaluate


def summary(task: contract.Task, total: Mapping[str, Any], data: Data) -> dict[str, Any]:
    """Returns figures from the sums of `contract.evaluate`."""
    figures = {
        **task.summary(total, data),
        **mtp.figures(total["further"]),
        **depth.figures(total["depth"]),
    }
    result: dict[str, Any] = {name: float(value) for name, value in figures.items()}
    moe: dict[str, np.ndarray] = {}
    if total["moe"]:
        moe = {name: np.asarray(value) for name, value in load.metrics(total["moe"]).items()}
        result["max_vio"] = float(moe["max_vio"].mean())
    return {**result, "moe": moe, "routing": total["routing"]}
