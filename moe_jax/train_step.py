"""The whole state of a run, how it begins, and one optimizer step.

State is everything that a step changes: {step, params, router state, optimizer state, EMA, skipped,
masks, master copy}. The position in the data, the learning rate and all randomness derive from
`step`; nothing else is stateful, so a checkpoint of State resumes a run bit for bit.
"""

import re
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax import layout, optim
from moe_jax.accumulation import (
    first_of,
    make_forward,
    make_gradient,
    micro_batches,
    zeros_of,
)
from moe_jax.models.functions import Model, make_model
from moe_jax.moe import load, losses, sparse
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import RouterCfg
from moe_jax.names import name_of
from moe_jax.optim import spikes
from moe_jax.parallel import chip_flags, compiling
from moe_jax.parallel.mesh import P
from moe_jax.pipeline import totals as pipeline
from moe_jax.schema.config import Config
from moe_jax.tasks import TASKS, contract

__all__ = [
    "Model",
    "State",
    "advanced",
    "initial",
    "jit_step",
    "judged",
    "make_loss",
    "make_model",
    "make_step",
    "make_tx",
    "micro_batches",
    "parameter_names",
    "step_key",
    "updated",
]


# The MoE layers of the model, as an axis that the updates of their routers may reduce over.
LAYERS = "moe_layers"


class State(NamedTuple):
    """Holds everything that a step changes."""

    # Steps tried, int32.
    step: jax.Array
    params: dict[str, Any]
    router_state: dict[str, Any]
    opt_state: Any
    # Like params, in at least float32; or None.
    ema: Any
    # Steps in a row whose loss or gradient was not finite.
    skipped: jax.Array
    # What a rule of sparse experts keeps (moe/sparse); () = no rule.
    masks: Any = ()
    # What updates are added to (optim.master_copy): like params, in at least float32; () = they are
    # added to params.
    master: Any = ()
    # The last losses and gradient norms (train.spike_sigma); () = not kept.
    spikes: Any = ()


def judged(state: State) -> dict[str, Any]:
    """Returns the parameters that are evaluated and sampled: their moving average where there is
    one, in the dtype of the parameters.
    """
    if state.ema is None:
        return state.params
    return jax.tree.map(lambda e, x: e.astype(x.dtype), state.ema, state.params)


def updated(state: State) -> Any:
    """Returns what updates are added to: the master copy of the parameters where there is one, else
    themselves.
    """
    return state.params if state.master == () else state.master


def advanced(cfg: Config, state: State, moved: Any) -> State:
    """Returns the state with `moved` in the place of what `updated` returns of it.

    The parameters follow their master copy, rounded.
    """
    if not cfg.optim.master_copy:
        return state._replace(params=moved)
    return state._replace(params=optim.narrow_copy(moved, state.params), master=moved)


def make_tx(cfg: Config, params: Any) -> optax.GradientTransformation:
    """Returns the optimizer of a config, for parameters of that structure."""
    return optim.make(cfg.optim, params, stacked=cfg.model.scan)


def initial(cfg: Config, model: Model) -> Callable[[jax.Array], State]:
    """Returns a function: key -> State at step 0.

    To be jitted: the optimizer's moments inherit the sharding of their parameters.
    """

    def init(key: jax.Array) -> State:
        params, router_state = model.init(key)
        params, masks = sparse.begin(cfg.model.moe.sparse, params, stacked=cfg.model.scan)
        opt_state = dict(typing.cast(Any, make_tx(cfg, params).init(params)))
        ema = optim.begin_ema(params) if cfg.optim.ema_decay else None
        master = optim.wide_copy(params) if cfg.optim.master_copy else ()
        window = spikes.begin() if cfg.train.spike_sigma else ()
        # A zero for both counters, `step` and `skipped`.
        none = jnp.int32(0)
        return State(none, params, router_state, opt_state, ema, none, masks, master, window)

    return init


def jit_initial(cfg: Config, model: Model) -> Callable[[jax.Array], State]:
    """Returns `initial`, jitted for the devices of the current mesh."""
    return jax.jit(initial(cfg, model), compiler_options=compiling.runs_once())


def make_loss(cfg: Config, model: Model) -> Callable[..., tuple[jax.Array, tuple[Any, Any]]]:
    """Returns the loss, a function: (params, router state, batch, rng) -> (loss, (totals, parts)).

    With micro-batches the totals of all of them are summed in a scan and the objective is taken
    once, of the sums: a balance loss is a product of batch sums, so the gradients of micro-batches
    do not add up to it. The body is rematerialised: memory is that of one micro-batch, and the cost
    is one more forward pass. A step takes it where the losses ask for that (accumulation.py).
    """
    num, task = cfg.train.num_micro_batches, TASKS[cfg.task]
    coefficients, forward = cfg.model.moe.losses, make_forward(cfg, model)

    def totals_of(params: Any, router_state: Any, batch: Any, rng: jax.Array) -> Any:
        if num == 1:
            return forward(params, router_state, batch, rng)
        micro = micro_batches(batch, num, cfg.model.moe.group_rows)
        if cfg.mesh.stage > 1:
            return pipeline.totals_of(cfg, task, model, params, router_state, micro, rng)
        zero = zeros_of(jax.eval_shape(forward, params, router_state, first_of(micro), rng))

        @jax.checkpoint
        def body(sums, part):
            totals = forward(params, router_state, part, rng)
            return jax.tree.map(jnp.add, sums, totals), None

        totals, _ = jax.lax.scan(body, zero, micro)
        return totals

    def loss(params: Any, router_state: Any, batch: Any, rng: jax.Array):
        totals = totals_of(params, router_state, batch, rng)
        # Divided once, of the sums of all micro-batches.
        value, parts = contract.objective(totals, coefficients)
        return value, (totals, parts)

    return loss


def step_key(cfg: Config, step: jax.Array) -> jax.Array:
    """Returns the randomness of a step: of the seed and the step alone."""
    # 1 tells it from the keys of the first values.
    key = jax.random.fold_in(jax.random.key(cfg.seed), 1)
    return jax.random.fold_in(key, step)


def make_step(
    cfg: Config, model: Model, tx: optax.GradientTransformation
) -> Callable[..., tuple[State, dict[str, Any]]]:
    """Returns the step, a function: (state, batch) -> (state, metrics).

    A step whose loss or gradient is not finite, or a spike (optim/spikes.py), changes nothing but
    the counters.

    To be able to skip one (train.nonfinite_patience > 0, train.spike_sigma > 0) the old moments
    must outlive the new, which takes time and memory.
    """
    gradient, zeros = make_gradient(cfg, model, make_loss(cfg, model)), cfg.model.moe.sparse
    sigma = cfg.train.spike_sigma
    # Otherwise the run ends at such a step, and its state is never used or saved.
    can_skip = cfg.train.nonfinite_patience > 0 or sigma > 0

    def step(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        # 1. The gradient of the whole batch.
        rng = step_key(cfg, state.step)
        (loss, (totals, parts)), grads = gradient(state.params, state.router_state, batch, rng)
        with jax.named_scope("optimizer"):
            # 2. What the step would change.
            grads, moved, opt_state, masks = descend(cfg, tx, state, grads, rng)
            # 3. Whether it counts.
            squares = optim.squares(grads)
            # A leaf's sum of squares is finite only if each of its gradients is.
            finite = jnp.isfinite(loss) & jnp.isfinite(squares).all()
            takes, window = finite, state.spikes
            if sigma:
                norm = jnp.sqrt(squares.sum())
                spike = spikes.is_spike(window, loss, norm, sigma)
                takes, window = finite & ~spike, spikes.advance(window, loss, norm, spike)

            def keep(new, old):
                """Returns the new values, the old ones where the step counts for nothing."""
                if not can_skip:
                    return new
                return jax.tree.map(lambda n, o: jnp.where(takes, n, o), new, old)

            # 4. What it changes.
            moved, masks = keep((moved, masks), (updated(state), state.masks))
            # The rate follows the step, not the updates.
            kept = keep(opt_state, dict(state.opt_state)) | {"rate": opt_state["rate"]}
            ema = state.ema
            # The average follows the master copy where there is one, which is not rounded.
            if ema is not None:
                ema = optim.update_ema(ema, moved, cfg.optim.ema_decay)
                # What a rule has cut does not live on in the average.
                if zeros.rule != "none":
                    ema = sparse.mask(ema, sparse.alive(zeros, moved, masks))
                ema = keep(ema, state.ema)
            router_state = state.router_state
            if routers_learn(cfg, state.params):
                router_state = keep(update_routers(cfg, router_state, totals["moe"]), router_state)
        # A spike is finite, so it ends a row of steps that were not.
        skipped = jnp.where(finite, 0, state.skipped + 1)
        new = advanced(cfg, state, moved)._replace(
            step=state.step + 1,
            router_state=router_state,
            opt_state=kept,
            ema=ema,
            skipped=skipped,
            masks=masks,
            spikes=window,
        )
        # 5. What is told of it.
        metrics = {
            "loss": loss,
            **parts,
            # Before the clip.
            "grad_norm": jnp.sqrt(squares.sum()),
            "learning_rate": optim.rate(cfg.optim)(state.step),
            "tokens": totals["tokens"],
            "skipped": skipped,
            "finite_leaves": jnp.isfinite(squares),
            "moe": load.metrics(totals["moe"]) if totals["moe"] else {},
        }
        if sigma:
            metrics["spikes"] = window.spikes
        if zeros.rule != "none":
            metrics["expert_density"] = sparse.density(new.params)
        # Whole on every device, so that each process can read them.
        return new, jax.sharding.reshard(metrics, P())

    return step


def jit_step(cfg: Config, model: Model, tx: optax.GradientTransformation) -> Any:
    """Returns the step as training runs it: the state is donated, so that the new one is written
    over it, and the flags are those of the chips of the current mesh.
    """
    flags = chip_flags.of(jax.sharding.get_mesh(), cfg.chip_flags)
    step = make_step(cfg, model, tx)
    return jax.jit(step, donate_argnums=0, compiler_options=dict(flags) or None)


def descend(
    cfg: Config, tx: optax.GradientTransformation, state: State, grads: Any, rng: jax.Array
) -> tuple[Any, Any, dict[str, Any], Any]:
    """Makes one update.

    Returns (gradients that it followed, what `updated` becomes, optimizer's state, masks).

    Sparse experts have exact zeros in all of them.
    """
    # The masked gradients make the norm, the moments and the update; RigL grows by the dense ones.
    zeros, dense, masks = cfg.model.moe.sparse, grads, state.masks
    grads = sparse.mask(dense, masks)
    updates, opt_state = tx.update(grads, state.opt_state, updated(state))
    # Of optim.make: clip, direction, decay, rate.
    opt_state = dict(typing.cast(Any, opt_state))
    params = optax.apply_updates(updated(state), updates)
    if zeros.rule != "none":
        now = sparse.Now(state.step + 1, cfg.train.steps, optim.rate(cfg.optim)(state.step), rng)
        params, masks = sparse.advance(zeros, now, dense, params, masks, stacked=cfg.model.scan)
        # What was cut just now leaves no momentum behind.
        opt_state = sparse.mask_moments(opt_state, masks)
    return grads, params, opt_state, masks


def routers_learn(cfg: Config, params: Any) -> bool:
    """Returns whether the routers' state may move: not where optim.train_only trains no router and
    no expert, for then the model is frozen.
    """
    of_moe = [name for name in parameter_names(params) if "moe" in name.split("/")]
    return any(re.search(cfg.optim.train_only, name) for name in of_moe)


def update_routers(cfg: Config, router_state: dict[str, Any], totals: Any) -> dict[str, Any]:
    """Returns the routers' state after a step, from the totals of the whole batch.

    It is computed once per optimizer step, outside of autodiff.
    """
    if not jax.tree.leaves(router_state):
        return router_state
    moe = cfg.model.moe
    # The totals are of the whole batch already, so there is nothing to add up over devices.
    router_cfg = RouterCfg(
        moe.num_experts,
        moe.router_options,
        moe.group_rows,
        cfg.model.vocab_size,
        total=lambda z: z,
        mean_over_layers=lambda z: jax.lax.pmean(z, LAYERS),
    )

    def update(state: dict[str, jax.Array], totals: Any) -> dict[str, jax.Array]:
        """Returns the router state of one layer after the step."""
        state = dict(state)
        # The weight of the balance losses is not the router's own.
        weight = state.pop("balance_weight") if moe.adaptive.rate else None
        new = dict(ROUTERS[moe.router].update(state, totals, router_cfg))
        if weight is not None:
            new["balance_weight"] = losses.adapt(weight, totals, moe.adaptive)
        return new

    # One leading axis over all MoE layers, whatever the layout: one update serves all.
    layers = layout.by_moe_layer(router_state, cfg.model)
    new = jax.vmap(update, axis_name=LAYERS)(layers, totals)
    return dict(layout.into_moe_layers(new, router_state, cfg.model))


def parameter_names(params: Any) -> list[str]:
    """Returns names in the order of `jax.tree.leaves`, as in checkpoints.

    One is "repeats/0/blocks/0/attention/weights/q".
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return [name_of(path) for path, _ in leaves]
