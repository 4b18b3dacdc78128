"""Faults of a pipeline: of its bubble, of what stages share, and of which micro-batch is where.

Shapes as in moe_jax/pipeline/ring.py.
"""

import jax
import jax.numpy as jnp

from moe_jax import optim
from moe_jax.parallel import stages
from moe_jax.pipeline import ring, totals
from moe_jax.pipeline.schedule import Schedule
from mutations.contract import Mutation, times_gradient

# Two stages of one repeat each, and a tied embedding: both ends of the model have its gradient.
SMALL = {"model.repeats": 2, "model.tie_embeddings": True}
ONE_F_ONE_B = SMALL | {"train.pipeline_schedule": "1f1b"}


def bubble_counts(patch):
    """A tick without a work adds the balance sums of whatever lies there."""
    right = ring._count

    def wrong(sums, work, part):
        return right(sums, work._replace(valid=jnp.bool_(True)), part)

    patch.setattr(ring, "_count", wrong)


def ends_of_one_stage(patch):
    """The gradient of embedding and head is that of the micro-batches of stage 0."""
    right = totals._Parts.on_stage

    def wrong(self, stage_1, chunks, ends, *more):
        is_first = stage_1[0] == 0
        ends = jax.tree.map(lambda z: times_gradient(is_first.astype(z.dtype), z), ends)
        return right(self, stage_1, chunks, ends, *more)

    patch.setattr(totals._Parts, "on_stage", wrong)


def norm_of_one_stage(patch):
    """The norm by which gradients are clipped has the layers of stage 0 alone."""
    right = optim.squares

    def wrong(tree):
        def own(z):
            if not stages.is_split(z):
                return z
            num = z.shape[0] // 2
            return stages.whole(z)[:num]

        return right(jax.tree.map(own, tree))

    patch.setattr(optim, "squares", wrong)


def rows_of_own_micro_batch(patch):
    """A stage has the tokens of another stage's micro-batch with the places of its own."""
    right = jax.lax.all_gather

    def wrong(z, axis_name, **more):
        if axis_name != "stage":
            return right(z, axis_name, **more)
        return jnp.concatenate([z, z])

    patch.setattr(jax.lax, "all_gather", wrong)


def layers_counted_from_the_stage(patch):
    """Every stage draws the dropout of the first layers."""
    right = totals.run_repeats

    def wrong(model, x_BSD, batch, rng, train, first):
        return right(model, x_BSD, batch, rng, train, 0 * first)

    patch.setattr(totals, "run_repeats", wrong)


def too_few_kept(patch):
    """1F1B writes the input of a later micro-batch over one that is still needed."""
    right = Schedule.in_flight.fget
    patch.setattr(Schedule, "in_flight", property(lambda self: right(self) - 1))


def where(plant, found_by, changes, full=True, reported=""):
    return Mutation(plant, found_by, "stages", changes, reported, full)


FAULTS = {
    "balance sums counted in the bubble": where(bubble_counts, "forward", SMALL, full=False),
    "a tied embedding's gradient of one stage": where(ends_of_one_stage, "gradients", SMALL),
    "clip norm of one stage": where(norm_of_one_stage, "sums", SMALL),
    "places of another micro-batch": where(rows_of_own_micro_batch, "forward", SMALL),
    "layers counted from the stage": where(layers_counted_from_the_stage, "forward", SMALL),
    "1F1B keeps one input too few": where(too_few_kept, "gradients", ONE_F_ONE_B),
}
