"""A stack of repeats as a pipeline: what the stages compute and pass on, tick by tick.

It runs inside of a shard_map that is manual over `stage` alone, so that a block is what it is
without a pipeline: its own code over the other axes. Each stage has its chunks of layers, and
everything that moves between stages moves here, by `ppermute` to a neighbour.

Forward, the stages keep the inputs of their chunks ("gpipe"), or nothing ("1f1b"). The backward
pass is written out: it computes a chunk again from its input and takes its gradient, and "1f1b"
makes the inputs once more, each shortly before it is used. Gradients of weights are added up in the
stage that has them.

Inputs of the first stage come from all stages, outputs of the last one go to all: micro-batch
i belongs to stage i mod p, which takes it through the ends of the model (pipeline/totals.py). They
travel one stage a tick, in the order in which they are needed.

Shapes: p stages, m micro-batches, v chunks of n repeats, G = m / p groups, b rows of a micro-batch,
S sequence, D model, L MoE layers of a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.parallel.stages import AXIS
from moe_jax.pipeline.schedule import GPIPE, Phase, Schedule, Work

# The scope of what moves from stage to stage.
TO_STAGE = "to_stage"


class Chunks(NamedTuple):
    """Holds what chunks are made of, on the stage that has them."""

    # Weights, each [v, n, ...].
    weights: Any
    # The state of their routers, likewise.
    router_state: Any


# (weights [n, ...], router state, x_bSD, batch, number of the first repeat, rng)
#   -> (x_bSD, totals of the layers [L, ...])
Run = Callable[..., tuple[Array, Any]]


class Ring(NamedTuple):
    """Holds what does not change while a pipeline runs."""

    run: Run
    schedule: Schedule
    # One of those of schedule.py.
    name: str


class Inputs(NamedTuple):
    """Holds what a pipeline reads."""

    # The number of this stage. It is data, because XLA cannot tell a device its place on one axis
    # where it partitions over others.
    stage: Array
    chunks: Chunks
    # The micro-batches of this stage before the first layer.
    x_GbSD: Any
    # What blocks read beside activations, of all micro-batches, each [p G, b, ...], those of one
    # stage side by side.
    batches: Any
    rng: Array


class Moving(NamedTuple):
    """Holds what moves from stage to stage, one a tick."""

    # To the next stage; in the backward pass to the one before.
    x_bSD: Array
    # What the first stage (in the backward pass the last one) is fed, on its way there.
    feed_bSD: Array


def run_ring(ring: Ring, inputs: Inputs) -> tuple[Array, Any]:
    """Returns (the micro-batches of this stage after all layers [G, b, S, D], the totals of the
    layers of this stage over all micro-batches [v, L, ...]).
    """
    weights, router_state = inputs.chunks
    # A custom_vjp differentiates whole arguments: weights and activations are two of their own.
    rest = inputs._replace(chunks=Chunks((), router_state), x_GbSD=())
    return _through(ring, weights, inputs.x_GbSD, rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(ring: Ring, weights: Any, x_GbSD: Array, rest: Inputs) -> tuple[Array, Any]:
    """Returns (outputs, totals). `rest`: the inputs without the two that have a gradient."""
    inputs = _with_gradient(rest, weights, x_GbSD)
    y_GbSD, totals, _ = _forward_pass(ring, inputs, 0)
    return y_GbSD, totals


def _forward(
    ring: Ring, weights: Any, x_GbSD: Array, rest: Inputs
) -> tuple[tuple[Array, Any], tuple[Inputs, Array]]:
    inputs = _with_gradient(rest, weights, x_GbSD)
    # GPipe keeps the input of every work; "1f1b" computes inputs again as it needs them.
    num_kept = ring.schedule.works if ring.name == GPIPE else 0
    y_GbSD, totals, kept = _forward_pass(ring, inputs, num_kept)
    return (y_GbSD, totals), (inputs, kept)


def _backward(
    ring: Ring, residuals: tuple[Inputs, Array], cotangents: tuple[Array, Any]
) -> tuple[Any, Array, None]:
    inputs, kept = residuals
    dweights, dx_GbSD = _backward_pass(ring, inputs, kept, *cotangents)
    return dweights, dx_GbSD, None


_through.defvjp(_forward, _backward)


def _with_gradient(rest: Inputs, weights: Any, x_GbSD: Array) -> Inputs:
    return rest._replace(chunks=rest.chunks._replace(weights=weights), x_GbSD=x_GbSD)


def _forward_pass(ring: Ring, inputs: Inputs, num_kept: int) -> tuple[Array, Any, Array]:
    """Returns (outputs, totals, the inputs of all works where `num_kept` is not 0)."""
    schedule, stage = ring.schedule, inputs.stage
    last = schedule.stages - 1
    # In this tick the last micro-batch of group 0 has left the last stage, and so all of them have
    # reached their stages.
    first_end = schedule.round + last - 1
    zero_bSD = jnp.zeros_like(inputs.x_GbSD[0])

    def tick(carry, t):
        moving, out_bSD, y_GbSD, totals, kept = carry
        work = schedule.forward(t, stage)
        (y_bSD, of_work), moving, kept = _forward_work(ring, inputs, moving, kept, t)
        totals = _count(totals, work, of_work)
        # Outputs leave the last stage, and go down stage by stage until their own one takes them.
        out_bSD = _where(stage == last, y_bSD, _down(out_bSD, schedule))
        group, rest = (t - first_end) // schedule.round, (t - first_end) % schedule.round
        y_GbSD = _put(y_GbSD, group, (t >= first_end) & (rest == 0), out_bSD)
        return (moving, out_bSD, y_GbSD, totals, kept), None

    begin = (
        Moving(zero_bSD, zero_bSD),
        zero_bSD,
        jnp.zeros_like(inputs.x_GbSD),
        _no_totals(ring, inputs),
        _buffer(zero_bSD, num_kept),
    )
    with jax.named_scope("pipeline_forward"):
        end, _ = lax.scan(tick, begin, _numbers(0, schedule.ticks))
    _, _, y_GbSD, totals, kept = end
    return y_GbSD, totals, kept


def _forward_work(
    ring: Ring, inputs: Inputs, moving: Moving, kept: Array, t: Array
) -> tuple[tuple[Array, Any], Moving, Array]:
    """Does the forward work of this stage in tick t.

    Returns ((output, totals of the layers), what moves, the inputs that are kept).
    """
    schedule, stage = ring.schedule, inputs.stage
    work = schedule.forward(t, stage)
    # Stage 0 needs the micro-batches of stages 0, 1, ... one after the other.
    begins = t % schedule.round == 0
    fresh_bSD = _get(inputs.x_GbSD, t // schedule.round)
    feed_bSD = _where(begins, fresh_bSD, moving.feed_bSD)
    x_bSD = _where((stage == 0) & (work.chunk == 0), feed_bSD, moving.x_bSD)
    # A work that is not valid (a bubble) keeps nothing.
    if kept.shape[0]:
        kept = _put(kept, work.number % kept.shape[0], work.valid, x_bSD)
    own = jax.tree.map(lambda z: _get(z, work.chunk), inputs.chunks)
    y_bSD, totals = _run(ring, inputs, work)(own.weights, x_bSD)
    moving = Moving(_up(y_bSD, schedule), _down(feed_bSD, schedule))
    return (y_bSD, totals), moving, kept


def _backward_pass(
    ring: Ring, inputs: Inputs, kept: Array, dy_GbSD: Array, dtotals: Any
) -> tuple[Any, Array]:
    """Returns the gradients of the weights [v, n, ...] and of the inputs [G, b, S, D].

    What works pass on is separate: forward to the next stage, backward to the one before.
    """
    schedule, stage = ring.schedule, inputs.stage
    last = schedule.stages - 1
    first_backward = schedule.first_backward(ring.name)
    # In this tick, of backward works, stage 0 has done those of group 0.
    first_end = schedule.round + last - 1
    zero_bSD = jnp.zeros_like(inputs.x_GbSD[0])
    if ring.name != GPIPE:
        kept = _buffer(zero_bSD, schedule.kept(ring.name))

    def backward_work(state, kept, t):
        moving, out_bSD, dx_GbSD, dweights = state
        work = schedule.backward(t, stage)
        # The last stage needs those of stages 0, 1, ... one after the other.
        begins = t % schedule.round == 0
        fresh_bSD = _get(dy_GbSD, t // schedule.round)
        feed_bSD = _down(_where(begins, fresh_bSD, moving.feed_bSD), schedule)
        ends = (stage == last) & (work.chunk == schedule.chunks - 1)
        dy_bSD = _where(ends, feed_bSD, moving.x_bSD)
        x_bSD = _get(kept, work.number % kept.shape[0])
        own = jax.tree.map(lambda z: _get(z, work.chunk), inputs.chunks)
        # The forward work once more, from its input: nothing else was kept.
        _, transposed = jax.vjp(_run(ring, inputs, work), own.weights, x_bSD)
        # Without a work the cotangents are zeros, and so are all gradients.
        down = (dy_bSD, jax.tree.map(lambda z: _get(z, work.chunk), dtotals))
        down = jax.tree.map(lambda z: _where(work.valid, z, jnp.zeros_like(z)), down)
        dweights_work, dx_bSD = transposed(down)

        def add(sums, part):
            return _put(sums, work.chunk, True, _get(sums, work.chunk) + part)

        dweights = jax.tree.map(add, dweights, dweights_work)
        out_bSD = _down(_where(stage == 0, dx_bSD, out_bSD), schedule)
        group, rest = (t - first_end) // schedule.round, (t - first_end) % schedule.round
        dx_GbSD = _put(dx_GbSD, group, (t >= first_end) & (rest == 0), out_bSD)
        return Moving(_down(dx_bSD, schedule), feed_bSD), out_bSD, dx_GbSD, dweights

    def ticks(phase: Phase, carry):
        def tick(carry, t):
            forward, backward, kept = carry
            if phase.forward:
                _, forward, kept = _forward_work(ring, inputs, forward, kept, t)
            if phase.backward:
                backward = backward_work(backward, kept, t - first_backward)
            return (forward, backward, kept), None

        return lax.scan(tick, carry, _numbers(phase.first, phase.ticks))[0]

    nothing = Moving(zero_bSD, zero_bSD)
    dweights = jax.tree.map(jnp.zeros_like, inputs.chunks.weights)
    carry = (nothing, (nothing, zero_bSD, jnp.zeros_like(inputs.x_GbSD), dweights), kept)
    with jax.named_scope("pipeline_backward"):
        for phase in schedule.phases(ring.name):
            if phase.ticks:
                carry = ticks(phase, carry)
    _, (_, _, dx_GbSD, dweights), _ = carry
    return dweights, dx_GbSD


def _run(ring: Ring, inputs: Inputs, work: Work) -> Callable[[Any, Array], tuple[Array, Any]]:
    """Returns the layers of a work as a function of their weights and their input."""
    schedule = ring.schedule
    place = work.chunk * schedule.stages + inputs.stage
    state = jax.tree.map(lambda z: _get(z, work.chunk), inputs.chunks.router_state)

    # Those of one stage lie side by side.
    index = work.member * schedule.groups + work.group
    batch = jax.tree.map(lambda z: _get(z, index), inputs.batches)

    def run(weights: Any, x_bSD: Array) -> tuple[Array, Any]:
        # Layers are numbered through the model: some kinds differ by their number.
        num_repeats = jax.tree.leaves(weights)[0].shape[0]
        return ring.run(weights, state, x_bSD, batch, place * num_repeats, inputs.rng)

    return run


def _no_totals(ring: Ring, inputs: Inputs) -> Any:
    """Returns zeros in the place of the totals of all chunks, in the shapes of a work that is only
    traced.
    """
    schedule = ring.schedule

    def totals():
        work = schedule.forward(jnp.int32(0), inputs.stage)
        own = jax.tree.map(lambda z: z[0], inputs.chunks.weights)
        return _run(ring, inputs, work)(own, inputs.x_GbSD[0])[1]

    def zeros(z):
        return jnp.zeros((schedule.chunks, *z.shape), z.dtype)

    return jax.tree.map(zeros, jax.eval_shape(totals))


def _count(totals: Any, work: Work, part: Any) -> Any:
    """Adds the totals of a work to those of its chunk; a tick without a work counts for nothing."""

    def add(sums, z):
        z = _where(work.valid, z, jnp.zeros_like(z))
        return _put(sums, work.chunk, True, _get(sums, work.chunk) + z)

    return jax.tree.map(add, totals, part)


def _up(z: Array, schedule: Schedule) -> Array:
    """Passes an array on to the next stage, from the last one to stage 0."""
    return _passed(z, schedule.stages, 1)


def _down(z: Array, schedule: Schedule) -> Array:
    """Passes an array on to the stage before, from stage 0 to the last one."""
    return _passed(z, schedule.stages, -1)


def _passed(z: Array, num_stages: int, step: int) -> Array:
    pairs = [(stage, (stage + step) % num_stages) for stage in range(num_stages)]
    with jax.named_scope(TO_STAGE):
        return lax.ppermute(z, AXIS, pairs)


def _numbers(first: int, count: int) -> Array:
    return first + jnp.arange(count, dtype=jnp.int32)


def _where(condition: Array, a: Array, b: Array) -> Array:
    return lax.select(condition, a, b)


def _get(z: Array, index: Array) -> Array:
    """Returns z[index], of the nearest index that there is."""
    index = jnp.clip(index, 0, z.shape[0] - 1)
    return lax.dynamic_index_in_dim(z, index, keepdims=False)


def _put(z: Array, index: Array, condition: Array | bool, value: Array) -> Array:
    """Returns z with `value` at an index, where there is one and `condition` holds."""
    if condition is not True:
        condition = condition & (index >= 0) & (index < z.shape[0])
        value = _where(condition, value, _get(z, index))
    index = jnp.clip(index, 0, z.shape[0] - 1)
    return lax.dynamic_update_index_in_dim(z, value, index, 0)


def _buffer(like: Array, number: int) -> Array:
    """Returns zeros for `number` arrays like this one."""
    return lax.broadcast(jnp.zeros_like(like), (number,))
