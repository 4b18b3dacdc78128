"""The training sums of a batch, computed by a pipeline over the mesh axis `stage`.

The repeats of the model's stack are split over the stages (pipeline/ring.py). What comes before
them and after them, the ends, is no stage of its own: each stage takes its share of the
micro-batches through embedding, prefix, suffix, head and loss. So no stage waits for a head, and
none is computed twice; every stage has the weights of the ends, and their gradients are added up
over the stages.

The sums are those of accumulation without a pipeline (train_step.py): of every micro-batch, added
up; `tasks.contract.objective` divides them once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import layout
from moe_jax.layout import REPEATS
from moe_jax.models.functions import Model
from moe_jax.models.stack import Reached, Resume, Stop, run_repeats
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.parallel.stages import AXIS, numbers
from moe_jax.pipeline import schedule as schedules
from moe_jax.pipeline.ring import Chunks, Inputs, Ring, run_ring
from moe_jax.pipeline.schedule import Schedule
from moe_jax.schema.config import Config
from moe_jax.tasks import contract
from moe_jax.tasks.contract import Task

# The totals of layers, which are joined along their first axis.
OF_LAYERS = ("moe", "depth")


def totals_of(
    cfg: Config, task: Task, model: Model, params: Any, router_state: Any, micro: Any, rng: Any
) -> dict[str, Any]:
    """Returns what `contract.forward` gives of all micro-batches, added up.

    `micro`: the arrays of the batch [m, B / m, ...], as train_step.py makes them.
    """
    schedule = schedules.of(cfg)
    # Micro-batch i is the one of stage i mod p, in group i // p.
    groups = (schedule.groups, schedule.stages)

    def grouped(z):
        return jnp.reshape(z, groups + z.shape[1:], out_sharding=P(None, AXIS, BATCH))

    (repeats, ends), (states, end_states) = _apart(params), _apart(router_state)
    chunks = jax.tree.map(lambda z: _chunks(z, schedule), Chunks(repeats, states))
    parts = _Parts(task, model, schedule, cfg.train.pipeline_schedule)
    run = jax.shard_map(
        parts.on_stage,
        in_specs=(P(AXIS), P(None, AXIS), P(), P(), P(None, AXIS), P()),
        out_specs=(P(AXIS), P(None, AXIS), P(AXIS)),
        axis_names={AXIS},
        # A shard_map within one that is manual over some axes keeps, of jax 0.10 to 0.12, residuals
        # split over those axes too, which cannot be lowered (core.ShapedArray.nospec). Unchecked,
        # nothing here is known to vary over `stage`. All that leaves is split over it, and the
        # gradient of what comes in whole is a sum over it.
        check_vma=False,
    )
    micro = jax.tree.map(grouped, micro)
    before, middle, after = run(numbers(), chunks, ends, end_states, micro, rng)
    # The sums of all stages, each of its own micro-batches.
    before, after = jax.tree.map(lambda z: z.sum(0), (before, after))
    # [v, p L, ...] -> [v p L, ...]: chunk by chunk, which is the order of the layers.
    middle = jax.tree.map(lambda z: z.reshape(-1, *z.shape[2:]), jax.sharding.reshard(middle, P()))
    for name in OF_LAYERS:
        parts_in_order = [before[name], middle[name], after[name]]
        after[name] = layout.join_sums(jnp.concatenate, parts_in_order)
    return after


class _Parts:
    """The three parts of a model's forward pass, on one stage."""

    def __init__(self, task: Task, model: Model, schedule: Schedule, name: str):
        self.task, self.model, self.schedule, self.name = task, model, schedule, name

    def on_stage(
        self,
        stage_1: jax.Array,
        chunks: Chunks,
        ends: Any,
        end_states: Any,
        micro: Any,
        rng: jax.Array,
    ) -> tuple[Any, Any, Any]:
        """Returns the totals of the prefix [1, L, ...], of the repeats [v, L, ...] and of what is
        after them [1, ...]; the repeats are those of this stage, and the micro-batches of the rest.

        `stage_1`: the number of this stage.
        """
        # [G, 1, b, ...]: of this stage.
        micro = jax.tree.map(lambda z: z[:, 0], micro)

        def module(repeats):
            """Returns the model with something else in the place of its repeats."""
            first = jax.tree.map(lambda z: z[0], chunks)
            bound = self.model.bind(
                _together(ends, first.weights), _together(end_states, first.router_state)
            )
            bound.repeats = repeats
            return bound

        def enter(micro):
            try:
                # The model runs up to its stack, which raises Reached with all that it was given.
                contract.forward(self.task, module(Stop()), micro, rng)
            except Reached as reached:
                if reached.rng is not rng:
                    raise ValueError("a model gives its stack another key than its own") from None
                return contract.of_layers(reached.sums), (reached.x_BSD, reached.batch)
            raise ValueError("a model has no stack")

        def leave(args):
            micro, x_bSD = args
            return contract.forward(self.task, module(Resume(x_bSD)), micro, rng), ()

        before, (x_GbSD, batches) = _over_groups(enter, micro)
        # What blocks read is small, and every stage needs that of every micro-batch: [p G, ...].
        batches = jax.tree.map(lambda z: jax.lax.all_gather(z, AXIS, tiled=True), batches)
        ring = Ring(self._run(ends, end_states), self.schedule, self.name)
        inputs = Inputs(stage_1[0], chunks, x_GbSD, batches, rng)
        x_GbSD, middle = run_ring(ring, inputs)
        after, _ = _over_groups(leave, (micro, x_GbSD))
        before, after = jax.tree.map(lambda z: z[None], (before, after))
        return before, middle, after

    def _run(self, ends: Any, end_states: Any) -> Callable[..., Any]:
        """Returns the layers of a chunk, as `ring.Run` has it."""
        # The ends only complete the model, and are not read.
        ends, end_states = jax.eval_shape(lambda: (ends, end_states))

        def run(weights, states, x_bSD, batch, first, rng):
            bound = self.model.bind(_together(ends, weights), _together(end_states, states))
            x_bSD, sums = run_repeats(bound, x_bSD, batch, rng, True, first)
            return x_bSD, contract.of_layers(sums)

        return run


def _over_groups(run: Callable[[Any], tuple[Any, Any]], micro: Any) -> tuple[Any, Any]:
    """Returns (the totals of all micro-batches of this stage, what else `run` gives of each)."""

    # Of the ends, too, one micro-batch at a time has its activations.
    @jax.checkpoint
    def body(totals, part):
        of_part, beside = run(part)
        return jax.tree.map(jnp.add, totals, of_part), beside

    first = jax.tree.map(lambda z: z[0], micro)
    abstract, _ = jax.eval_shape(run, first)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract)
    return jax.lax.scan(body, zero, micro)


def _apart(tree: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns (what lies below the repeats, {} for nothing; all else)."""
    rest = {key: value for key, value in tree.items() if key != REPEATS}
    return tree.get(REPEATS, {}), rest


def _together(rest: dict[str, Any], repeats: Any) -> dict[str, Any]:
    return rest | {REPEATS: repeats} if repeats else rest


def _chunks(z: jax.Array, schedule: Schedule) -> jax.Array:
    """Returns an array of all repeats [R, ...] as chunks [v, p n, ...], split over the stages that
    run them: each stage's are [v, n, ...].
    """
    v, spec = schedule.chunks, jax.typeof(z).sharding.spec
    return jnp.reshape(z, (v, -1) + z.shape[1:], out_sharding=P(None, AXIS, *spec[1:]))
