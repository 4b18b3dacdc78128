"""What the routing is worth while a model learns: training goes on from a checkpoint under other
routings than the model's own.

    own, shuffled, balanced, random     as in replay.py
    frozen                              as the checkpoint routes the same batch, whatever has been
                                        learned since

At every step the model in training routes its batch (as it evaluates: without dropout and noise),
the way changes that routing, and the step is taken under the router "recorded"; the held-out
batches are then routed alike. All ways begin with the same parameters and moments and see the same
batches. Gates: where they are the softmax over a token's experts (top_k that renormalises), the
present router gives them to whatever experts it is told, and learns through them; else they are
constants, and it learns by its auxiliary losses alone. A router's state stays as it was at the
checkpoint.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.batches import Batches, PackedText
from moe_jax.errors import UserError
from moe_jax.instruments import held_out, replay
from moe_jax.instruments.held_out import Run
from moe_jax.moe import probe
from moe_jax.moe.routing import top_k
from moe_jax.parallel.batch_rows import local_rows
from moe_jax.schema.config import Config, MoEConfig
from moe_jax.train_step import State, judged, make_model, make_step, make_tx

FROZEN = "frozen"
WAYS = {**replay.WAYS, FROZEN: replay.own}

# (way, params, batch, number of its draws) -> the batch with its routing
Route = Callable[[str, Any, PackedText, int], PackedText]


def evaluate(
    run: Run, cfg: Config, state: State, steps: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Returns {way: figures} as replay.evaluate gives them, after `steps` steps under each way,
    with gaps to "own".

    Args:
      cfg: of the training run, as `run.cfg` may have another dispatcher.
      state: of the checkpoint, with the moments of the optimizer.
    """
    # A Run whose batches are those of training.
    training_size = dataclasses.replace(cfg.eval, batch_size=cfg.train.batch_size)
    learning = run._replace(cfg=dataclasses.replace(cfg, eval=training_size))
    route_heldout, route_batch = make_route(run, state, seed), make_route(learning, state, seed)
    # How many choices a token has shows in a first record.
    first = route_heldout("own", state.params, run.batches[0], 0)
    num_choices = first.request.recorded[0].shape[-1]
    whose_gates = gates(cfg.model.moe)
    learner_model = replay.under(cfg.model, num_choices, whose_gates)
    begin, step_fn = make_learner(dataclasses.replace(cfg, model=learner_model), state)
    sums_of = held_out.make_sums(run, replay.under(run.cfg.model, num_choices, whose_gates))
    batches = Batches(run.dataset, "train", cfg.seed, cfg.train.batch_size)
    rows = local_rows(cfg.train.batch_size)
    first_step, last_step = int(state.step), int(state.step) + steps

    def trained(way: str) -> State:
        now = begin
        for step in range(first_step, last_step):
            run.tell(f"{way}, step {step + 1} of {last_step}")
            batch = route_batch(way, now.params, batches.rows(step, rows), step)
            now, _ = step_fn(now, batch)
        return now

    def held_out_sums(way: str, now: State) -> list[Any]:
        params = judged(now)
        sums = []
        for number, batch in enumerate(run.batches):
            routed = route_heldout(way, params, batch, number)
            sums.append(sums_of(params, now.router_state, routed))
        return sums

    sums: dict[str, list[Any]] = {}
    notes: dict[str, str] = {}
    for way in WAYS:
        try:
            sums[way] = held_out_sums(way, trained(way))
        except UserError as error:
            notes[way] = str(error)
    return replay.gaps(run, sums, notes, "own")


def gates(moe: MoEConfig) -> str:
    """Returns whose gates the router "recorded" shall give: "router" where it then gives those of
    the model itself, else "recorded".
    """
    options = moe.router_options
    if not isinstance(options, top_k.Options) or options.scale != 1 or options.bias:
        return "recorded"
    # Both make the gates of a token a softmax over its experts alone.
    over_chosen = options.renormalize or options.softmax == "after"
    return "router" if over_chosen else "recorded"


def make_route(run: Run, old: State, seed: int) -> Route:
    """Returns the Route: the batch on the mesh, with what a way makes of the routing by `params`
    (way "frozen": by those of the checkpoint, `old`).
    """
    record_of = held_out.make_record(run.cfg.model, probe.INPUTS)

    def route(way: str, params: Any, batch: PackedText, number: int) -> PackedText:
        routing_params = old.params if way == FROZEN else params
        routing_run = run._replace(params=routing_params, router_state=old.router_state)
        on_mesh = held_out.put_batch(run, batch)
        record = record_of(routing_params, old.router_state, on_mesh)
        # The same draws for the same batch, whatever came before.
        rng = np.random.default_rng([seed, number])
        routing = replay.own_routing(routing_run, batch, record, rng)
        return replay.put_routed(run, batch, *WAYS[way](routing))

    return route


def make_learner(cfg: Config, state: State) -> tuple[State, Callable[..., Any]]:
    """Returns the state as one of the model of `cfg`, and its compiled step.

    Raises UserError for a router with other weights than a matrix.
    """
    model = make_model(cfg.model)
    params, router_state = jax.eval_shape(model.init, jax.random.key(0))
    # The moments have the shapes of the parameters, so these must not change.
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, state.params):
        raise UserError(
            "to train under a replayed routing (--steps) the router must have one matrix [d_model, "
            "num_experts] and no other weights: "
            "the moments of the optimizer are those of the checkpoint"
        )
    # The router "recorded" keeps no state of its own; what it lacks is left out.
    begin = state._replace(router_state=replay.fitted(state.router_state, router_state))
    return begin, jax.jit(make_step(cfg, model, make_tx(cfg, params)))
