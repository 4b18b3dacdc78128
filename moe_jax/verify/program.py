"""One compiled program per mesh, which tells everything that is compared: an optimizer step, its
gradients, and each token's loss.

Compilation is what a proof costs, so code is generated quickly (compiling.py); XLA's passes, which
decide the collectives, are a run's.
Shapes: B rows, S sequence, L MoE layers, K choices of a token.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from moe_jax import config, layout, train_step
from moe_jax.checkpoint import flat
from moe_jax.models.decodable import with_dispatcher
from moe_jax.moe.probe import ROUTING, split
from moe_jax.moe.routing import ROUTERS
from moe_jax.parallel import batch_rows, mesh
from moe_jax.parallel.compiling import QUICK
from moe_jax.schema.blocks import inner, is_depth
from moe_jax.schema.config import ModelConfig
from moe_jax.tasks import TASKS


class Probe(NamedTuple):
    """Holds what one step tells, as NumPy arrays on the host."""

    loss: float
    metrics: dict[str, Any]
    # Of every prediction, [B, ...], of a forward pass over the whole batch in training mode.
    nll: np.ndarray
    # [L, B, ...] per row, of that pass.
    sums: dict[str, np.ndarray]
    # Likewise of every choice of every token, [L, B, S, K]; {} where `recordable` says no.
    routing: dict[str, np.ndarray]
    # By name, layers unstacked.
    grads: dict[str, np.ndarray]
    # Of every further token that is predicted, as `nll`, by the name of its depth.
    further: Mapping[str, np.ndarray] = {}


class Program:
    """A config on a mesh of the first devices.

    `compile()` comes before `step`; all methods set the mesh themselves.
    """

    def __init__(self, raw: Mapping[str, Any], lengths: mesh.Lengths):
        self.raw, self.lengths = dict(raw), lengths
        self.cfg = config.build({**raw, "mesh": lengths.written()}, lengths.num_devices)
        self.task = TASKS[self.cfg.task]
        self.mesh = mesh.make(lengths, jax.devices()[: lengths.num_devices])
        self.wide = "float64" in (self.cfg.model.dtype, self.cfg.model.param_dtype)
        with self.entered():
            self.model = train_step.make_model(self.cfg.model)
            self._initial = train_step.initial(self.cfg, self.model)
            self.abstract = jax.eval_shape(self._initial, jax.random.key(0))

    @contextlib.contextmanager
    def entered(self):
        """Sets the mesh and the precision of the program."""
        with jax.set_mesh(self.mesh), jax.enable_x64(self.wide):
            yield

    def initial(self) -> train_step.State:
        """Returns the first state, drawn with the seed of the config."""
        with self.entered():
            key = jax.random.key(self.cfg.seed)
            # Compiled quickly, as everything here (compiling.py).
            return jax.jit(self._initial).lower(key).compile(compiler_options=QUICK)(key)

    def lower(self) -> jax.stages.Lowered:
        """Returns the lowered step, which `compile` takes."""
        with self.entered():
            batch = self.put(self.task.random(self.cfg, 0))
            return jax.jit(self._probe).lower(self.abstract, batch)

    def compile(self, lowered: jax.stages.Lowered | None = None) -> "Program":
        """Compiles the step, and returns the program.

        Any thread may make a program and call this. `lowered` is what `lower` returned, if that was
        called before.
        """
        self.run = (lowered or self.lower()).compile(compiler_options=QUICK)
        return self

    def put(self, batch: Any) -> Any:
        """Returns a batch of all rows on the mesh."""
        number = self.cfg.train.batch_size
        rows = batch_rows.local_rows(number)
        # Each process hands over the rows of its own devices alone.
        return batch_rows.put(jax.tree.map(lambda z: z[rows], batch), rows, number)

    def on_mesh(self, x: jax.Array) -> jax.Array:
        return jax.device_put(x, mesh.sharding("batch", *[None] * (x.ndim - 1)))

    def step(self, now: train_step.State, batch: Any) -> tuple[train_step.State, Probe]:
        """Returns the state after one step, and what the step tells."""
        with self.entered():
            new, metrics, grads, (nll, further), sums = self.run(now, self.put(batch))
            # The host waits here, so one step is in flight at a time.
            metrics, nll, further, (sums, routing) = host((metrics, nll, further, split(sums)))
            loss = float(metrics["loss"])
            return new, Probe(loss, metrics, nll, sums, routing, self.named(grads), further)

    def steps(self, now: train_step.State, number: int) -> tuple[train_step.State, list[Probe]]:
        """Returns the state after some steps on the task's random batches, and what each tells."""
        probes = []
        for step in range(number):
            now, probe = self.step(now, self.task.random(self.cfg, step))
            probes.append(probe)
        return now, probes

    def tied(self, begin: train_step.State) -> Probe:
        """Takes a step whose linear gates are 0.

        All scores tie, and ties go to the lowest experts: the worst load there is.
        """

        def without_gate(path, x):
            # A linear gate only: other routers have no matrix whose zeros tie all scores.
            is_gate = [key.key for key in path][-2:] == ["router", "gate"]
            return jnp.zeros_like(x) if is_gate else x

        with self.entered():
            params = jax.tree_util.tree_map_with_path(without_gate, begin.params)
        _, probe = self.step(begin._replace(params=params), self.task.random(self.cfg, 0))
        return probe

    def evaluate(self, now: train_step.State) -> dict[str, np.ndarray]:
        """Compiles and runs an evaluation as the config evaluates.

        Returns the loss of every prediction ("nll") and the sums per row.
        """
        cfg, dispatcher = self.cfg.model, self.cfg.eval.dispatcher
        if dispatcher != "same":
            cfg = with_dispatcher(cfg, dispatcher)

        def forward(params: Any, router_state: Any, batch: Any):
            model = train_step.make_model(cfg).bind(params, router_state)
            losses = self.task.losses(model, batch, jax.random.key(0), False)
            further = {name: one.nll for name, one in losses.further.items()}
            return {"nll": losses.nll, **further, **losses.sums}

        with self.entered():
            args = now.params, now.router_state, self.put(self.task.random(self.cfg, 0))
            compiled = jax.jit(forward).lower(*args).compile(compiler_options=QUICK)
            return host(compiled(*args))

    def named(self, tree: Any) -> dict[str, np.ndarray]:
        """Returns host copies of a tree's arrays by their names on disk, where layers are never
        stacked.
        """
        arrays = {}
        for name, array in flat.flatten(host(tree)).items():
            names = layout.layer_names(name, array.shape, self.cfg.model.scan)
            if names is None:
                arrays[name] = array
            else:
                # A scan stacks the layers in front.
                arrays |= dict(zip(names, array, strict=True))
        return arrays

    def _probe(self, now: train_step.State, batch: Any):
        """Takes a step, traced, and returns everything that a Probe holds."""
        # The step does not tell its gradients: they are taken where the optimizer receives them.
        gradients = []
        # The optimizer of the run, with an ear at its entrance.
        tx = train_step.make_tx(self.cfg, now.params)

        def update(updates, state, params=None):
            gradients.append(updates)
            return tx.update(updates, state, params)

        listening = optax.GradientTransformation(tx.init, update)
        step = train_step.make_step(self.cfg, self.model, listening)
        new, metrics = step(now, batch)
        # A forward pass of its own, with the key of the step: the step tells no loss of a token.
        rng = train_step.step_key(self.cfg, now.step)
        model = self.model.bind(now.params, now.router_state)
        if recordable(self.cfg.model):
            model = Recording(model)
        # In training mode and with the step's key, so that it draws what the step drew.
        losses = self.task.losses(model, batch, rng, True)
        further = {name: one.nll for name, one in losses.further.items()}
        return new, metrics, gradients[0], (losses.nll, further), losses.sums


class Recording:
    """A model whose layers also tell what became of every choice."""

    def __init__(self, model: Any):
        self._model = model
        if hasattr(model, "hidden"):
            # What a loss asks of a model (tasks/next_token.py).
            self.cfg, self.hidden = model.cfg, self._hidden

    def __call__(self, batch: Any, rng: jax.Array, train: bool) -> Any:
        return self._model(self._asking(batch), rng, train)

    def _hidden(self, batch: Any, rng: jax.Array, train: bool) -> Any:
        return self._model.hidden(self._asking(batch), rng, train)

    def _asking(self, batch: Any) -> Any:
        return batch._replace(request=batch.request._replace(record=ROUTING))


def recordable(model: ModelConfig) -> bool:
    """Returns whether every token's choices can be recorded.

    Soft MoE makes no choices, null experts that copy are none, and depth blocks record fewer places
    than others beside them.
    """
    moe_blocks = [block for block in model.blocks if inner(block) == "moe"]
    # All of them in depth blocks, or none.
    alike = len({is_depth(block) for block in moe_blocks}) == 1
    router, options = ROUTERS[model.moe.router], model.moe.router_options
    copies = router.declared(model.moe.num_experts, options).copies
    return alike and not router.num_slots(options) and not copies


def host(tree: Any) -> Any:
    """Returns NumPy copies of arrays on the mesh; with several processes, the same on each."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, jax.device_get(tree))

    def as_numbers(x):
        # A random key is no array that processes can exchange.
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return multihost_utils.process_allgather(jax.tree.map(as_numbers, tree), tiled=True)
