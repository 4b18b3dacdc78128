"""A model on the host, whose arrays change, and whether it still computes the same.

Outputs are compared on random inputs of the task, on one device.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config
from moe_jax.checkpoint import flat
from moe_jax.models.functions import make_model
from moe_jax.moe import load
from moe_jax.parallel import batch_rows, mesh
from moe_jax.run import Run
from moe_jax.tasks import TASKS

# Of the random inputs.
ROWS = 8


class Weights(NamedTuple):
    """A model on the host: its config as JSON has it, and its arrays by part ("params", "ema" where
    there is one, "router_state").
    """

    raw: dict[str, Any]
    parts: dict[str, Any]
    step: int


def read(trained: Run) -> Weights:
    """Returns the arrays of a run on the host."""
    parts = {"params": trained.parameters, "router_state": trained.router_state}
    if trained.moving_average is not None:
        parts["ema"] = trained.moving_average
    return Weights(trained.raw, jax.device_get(parts), trained.step)


def compare(old: Weights, new: Weights) -> float:
    """Returns the largest |difference| of outputs over the largest |output|, on random inputs of
    the task, in float32.
    """
    # Each by its own config: the new model may have another number of experts.
    before, after = (outputs(weights.raw, "float32", [weights])[0][0] for weights in (old, new))
    return _farthest(before, after, relative=True)


def gaps(old: Weights, new: Sequence[Weights]) -> tuple[list[float], float]:
    """Returns the largest |difference| of outputs (logits of a language model) in float64, on
    random inputs of the task, of each of several values of one new model, and the share of
    assignments that the first drops.
    """
    with jax.enable_x64(True):
        ((before, _),) = outputs(old.raw, "float64", [old])
        after = outputs(new[0].raw, "float64", new)
        sums = after[0][1]
    far = [_farthest(before, values, relative=False) for values, _ in after]
    # A model without experts drops nothing.
    if "dropped" not in sums:
        return far, 0.0
    totals = load.totals(sums)
    assigned = float(np.sum(load.assigned(totals)))
    return far, float(np.sum(totals["dropped"])) / max(assigned, 1.0)


def _farthest(before: Any, after: Any, *, relative: bool) -> float:
    """Returns the largest difference of two trees of outputs, over their size where asked."""

    def far(a: np.ndarray, b: np.ndarray) -> float:
        # Outputs that are all 0 have no size to divide by.
        size = max(float(np.abs(a).max()), 1e-30) if relative else 1.0
        return float(np.abs(a - b).max()) / size

    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return max(far(a, b) for a, b in pairs)


def outputs(raw: dict[str, Any], dtype: str, models: Sequence[Weights]) -> list[tuple[Any, Any]]:
    """Returns (outputs, sums of its layers) of models of one config, on one device and on random
    inputs of its task. They are compiled once.
    """
    raw = copy.deepcopy(raw)
    # Single layers, and the dtype in which they are compared.
    raw["model"] |= {"scan": False, "dtype": dtype, "param_dtype": dtype}
    raw |= {"mesh": mesh.ONE.written(), "simulate_devices": 0}
    raw["train"] |= {"batch_size": ROWS, "micro_batch_size": 0}
    raw["eval"] |= {"batch_size": ROWS}
    # A master copy is of bfloat16.
    raw["optim"] |= {"master_copy": False}
    # One group for each row, so that ROWS fit whatever the run had.
    raw["model"]["moe"]["group_rows"] = 1
    cfg = config.build(raw, 1)
    task, model = TASKS[cfg.task], make_model(cfg.model)
    batch = batch_rows.put(task.random(cfg, 0), np.arange(ROWS), ROWS)
    like = jax.eval_shape(model.init, jax.random.key(0))

    def on_mesh(x, like):
        return jax.device_put(x.astype(like.dtype), flat.placement(like))

    # The batch is an argument: as a constant of the program it would lose how its rows are placed.
    @jax.jit
    def forward(params, state, batch):
        losses = task.losses(model.bind(params, state), batch, jax.random.key(0), False)
        return jax.tree.map(lambda x: _of_valid(x, losses.weight), losses.outputs), losses.sums

    found = []
    for weights in models:
        arrays = weights.parts["params"], weights.parts["router_state"]
        params, router_state = jax.tree.map(on_mesh, arrays, like)
        found.append(jax.device_get(forward(params, router_state, batch)))
    return found


def _of_valid(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns outputs with 0 where they are of padding, which experts leave alone and a dense
    network does not.
    """
    if x.shape[: weight.ndim] != weight.shape:
        return x
    # [B, S] -> [B, S, 1, ...], as many dimensions as the output has.
    keeps = jnp.expand_dims(weight > 0, tuple(range(weight.ndim, x.ndim)))
    return jnp.where(keeps, x, 0)


def parameters_of(weights: Weights) -> int:
    """Returns the number of parameters."""
    return sum(array.size for array in jax.tree.leaves(weights.parts["params"]))
