"""What the instruments on a finished run share: its held-out batches on the mesh, their sums, and
the record of their routing.

Shapes: B rows, S sequence, L MoE layers, M blocks, E experts, K choices.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import layout
from moe_jax.data.batches import PackedText, eval_batches
from moe_jax.data.load import Dataset
from moe_jax.errors import UserError
from moe_jax.evaluate import summary
from moe_jax.instruments import record
from moe_jax.models.decodable import with_dispatcher
from moe_jax.parallel.batch_rows import local_rows, put
from moe_jax.parallel.mesh import P
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.tasks import contract
from moe_jax.tasks.lm import task as lm
from moe_jax.terminal.working import Tell, silent
from moe_jax.train_step import make_model

Arrays = dict[str, np.ndarray]


class Run(NamedTuple):
    """A trained model and the batches that it is probed on. The mesh is set by the caller."""

    cfg: Config
    dataset: Dataset
    params: Any
    router_state: Any
    # This process's rows of each held-out batch.
    batches: Sequence[PackedText]
    # Is told what is being measured.
    tell: Tell = silent


def open_run(
    cfg: Config, dataset: Dataset, params: Any, router_state: Any, num_batches: int
) -> Run:
    """Returns a Run on `num_batches` held-out batches of eval.batch_size rows, 0 = all; the model
    evaluates as `eval.dispatcher` says.

    Raises UserError for a model whose routing is not of every token: without MoE layers, or with a
    mixture of depths around one.
    """
    record.refuse_unrecordable(cfg.model)
    if cfg.eval.dispatcher != "same":
        # The instruments see the model as its evaluation does.
        cfg = dataclasses.replace(cfg, model=with_dispatcher(cfg.model, cfg.eval.dispatcher))
    size = cfg.eval.batch_size
    batches = list(eval_batches(dataset, size, num_batches or None, local_rows(size)))
    return Run(cfg, dataset, params, router_state, batches)


def put_batch(run: Run, batch: PackedText, request: Any = ()) -> PackedText:
    """Returns the batch on the mesh.

    Args:
      request: a Request to the MoE layers, in host arrays [B, M, ...] of the *whole* batch;
          () = none.
    """
    size = run.cfg.eval.batch_size
    request_on_mesh = jax.tree.map(lambda z: put_rows(run, z), request)
    return put(batch, local_rows(size), size)._replace(request=request_on_mesh)


def put_rows(run: Run, array: np.ndarray) -> jax.Array:
    """Returns a host array [B, ...] of the whole batch on the mesh, sharded over rows."""
    size = run.cfg.eval.batch_size
    rows = local_rows(size)
    return put(np.asarray(array)[rows], rows, size)


def make_sums(run: Run, cfg: ModelConfig) -> Callable[..., Any]:
    """Returns (params, router state, batch) -> the held-out sums of contract.evaluate as float64.

    The function is compiled once for each kind of request in the batch.
    """
    model = make_model(cfg)

    @jax.jit
    def sums_of(params: Any, router_state: Any, batch: PackedText) -> Any:
        sums = contract.evaluate(lm.TASK, model.bind(params, router_state), batch, run.dataset)
        # Every host needs all of them, and P() says that nothing is sharded.
        return jax.sharding.reshard(sums, P())

    def in_float64(*args: Any) -> Any:
        # The sums of batches are added on the host, where float32 would lose their last digits.
        return jax.tree.map(lambda x: np.asarray(x, np.float64), sums_of(*args))

    return in_float64


def figures(run: Run, sums: Sequence[Any]) -> dict[str, Any]:
    """Returns the means of the sums of several batches, as evaluate.summary gives them."""
    total = jax.tree.map(lambda *z: np.sum(z, 0), *sums)
    return summary(lm.TASK, total, run.dataset)


def make_record(cfg: ModelConfig, wanted: dict[str, Any]) -> Callable[..., Arrays]:
    """Returns (params, router state, batch) -> the record of the evaluated routing: [L, B, S, ...]
    of the whole batch, on every host.

    `wanted` names what is recorded (moe/probe.py).
    """
    model = make_model(cfg)

    @jax.jit
    def record_of(params: Any, router_state: Any, batch: PackedText) -> Any:
        bound = model.bind(params, router_state)
        # An evaluation draws nothing, so the key does not matter.
        fields = lm.record(bound, batch, jax.random.key(0), False, wanted)
        return jax.sharding.reshard(fields, P())

    def on_host(*args: Any) -> Arrays:
        return {name: np.asarray(field) for name, field in record_of(*args).items()}

    return on_host


def whole(batch: PackedText, size: int) -> PackedText:
    """Returns the batch of all processes on every host, from this process's rows."""
    if jax.process_count() == 1:
        return batch
    on_mesh = put(batch, local_rows(size), size)
    return jax.tree.map(lambda z: np.asarray(jax.sharding.reshard(z, P())), on_mesh)


def of_all_blocks(cfg: ModelConfig, layers: np.ndarray) -> np.ndarray:
    """Returns [B, M, ...] of all blocks from [L, B, ...] of the MoE layers: zero for the others."""
    blocks = np.zeros((len(cfg.blocks),) + layers.shape[1:], layers.dtype)
    # A request has an entry for every block; those without experts ignore theirs.
    blocks[layout.moe_blocks(cfg)] = layers
    return np.moveaxis(blocks, 0, 1)


def router_weights(params: Any, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the routers' parameters as {name: [L, ...]}, on every host."""
    return _stacked(_routers(params), cfg)


def router_state(states: Any, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the routers' states as {name: [L, ...]}, on every host."""
    return _stacked(states, cfg)


def _stacked(tree: Any, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Returns arrays of MoE layers as {name: [L, ...]}; {} where there are none."""
    if not jax.tree.leaves(tree):
        return {}

    @jax.jit
    def stack(tree: Any) -> dict[str, jax.Array]:
        return jax.sharding.reshard(layout.by_moe_layer(tree, cfg), P())

    return {name: np.asarray(weights) for name, weights in stack(tree).items()}


def _routers(tree: dict[Any, Any]) -> dict[Any, Any]:
    """Returns the parameters of the routers alone, below the same keys as in `tree`."""
    routers = {}
    for key, value in tree.items():
        if key == "moe":
            # Without the experts: a stack of all of them may be large.
            routers[key] = {"router": value.get("router", {})}
        elif isinstance(value, dict):
            routers[key] = _routers(value)
    return routers


def gates(run: Run, what: str) -> np.ndarray:
    """Returns the gate matrices [L, D, E] of a router that has no other weights.

    Raises UserError, which says what needs them, when that is not so.
    """
    model = run.cfg.model
    weights = router_weights(run.params, model)
    others = ", ".join(sorted(set(weights) - {"gate"}))
    if others:
        raise UserError(
            f'model.moe.router = "{model.moe.router}" has other weights than a gate '
            f"({others}), and {what} knows the gate alone"
        )
    shape_LDE = (model.num_moe_layers, model.d_model, model.moe.num_experts)
    # A router may have a gate for each task, or one that is no matrix.
    if weights.get("gate", np.zeros(0)).shape != shape_LDE:
        raise UserError(
            f'model.moe.router = "{model.moe.router}" has no linear gate, which {what} needs'
        )
    return weights["gate"]
