"""Does a plan (operations.py) to the whole state of a run: parameters, averages, moments, router
state and masks alike.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax import layout
from moe_jax.errors import UserError
from moe_jax.moe.routing import ROUTERS
from moe_jax.optim.optimizers import OPTIMIZERS
from moe_jax.schema.config import Config
from moe_jax.surgery import axes, gates
from moe_jax.surgery.configs import with_values
from moe_jax.surgery.mover import Mover, with_moments, with_noise
from moe_jax.surgery.operations import Plan
from moe_jax.surgery.snapshot import (
    OF_MODEL,
    VALUES,
    Arrays,
    Snapshot,
    names_of_model,
    owner,
    with_rounded_masters,
)

# The last matrix of an expert: what its output is multiplied with goes here.
LAST = "/moe/experts/w_out"
STATE = "/moe/state/"


class Asked(NamedTuple):
    """Holds what a user asks for beside a plan."""

    # Deviation of what changed experts get added, as a share of that of their weights.
    noise: float
    seed: int
    # Factor on the moments of experts that are not as they were; 0 = they begin anew.
    moments: float


class Done(NamedTuple):
    """Holds what was made."""

    snapshot: Snapshot
    # Parameters and router state before they were rounded, by their names on disk.
    exact: Arrays
    # Why the function is not kept, where that is known.
    reasons: tuple[str, ...]
    # Arrays that begin anew, for nobody can say which of their numbers belong to whom.
    anew: tuple[str, ...]


def operated(old: Snapshot, plan: Plan, asked: Asked) -> Done:
    """Returns the run after an operation. Raises UserError for what is not possible."""
    before = old.config
    refuse_renumbering(before, plan)
    raw = new_raw(old, plan)
    after = dataclasses.replace(old, raw=raw).config
    mover = Mover(before, after, plan)
    factor, reason = weight_of_parts(before, after, old, mover)
    known = names_of_model(old.arrays)
    exact: Arrays = {}
    anew = []
    for name, x in old.arrays.items():
        # Factored moments mix the numbers of experts: they begin anew.
        if mover.is_unclear(name):
            exact[name] = np.zeros(mover.shape(name))
            anew.append(name)
        elif mover.has_experts(name):
            inner = owner(name, known)
            layer = int(layout.moe_layer_numbers(keys_of(inner), before.model))
            exact[name] = changed(name, inner, x, mover, layer, factor, asked, after)
        else:
            exact[name] = x
    quiet = silenced(before, after, plan, exact)
    exact |= quiet
    # What is written is rounded; what is judged is not.
    made = {name: x.astype(old.arrays[name].dtype) for name, x in exact.items()}
    made = with_rounded_masters(after, made)
    reasons = [text for text in (reason, plan.loss) if text]
    if plan.new is not None and not quiet:
        reasons.append(
            f'router "{after.model.moe.router}" has no bias that keeps new experts unchosen: they '
            "compete with their parents"
        )
    if asked.noise and plan.changed is not None:
        reasons.append(f"--noise {asked.noise:g} moves the new experts")
    return Done(
        dataclasses.replace(old, raw=raw, arrays=made),
        {name: x for name, x in exact.items() if name.partition("/")[0] in OF_MODEL},
        tuple(reasons),
        tuple(anew),
    )


def changed(
    name: str,
    inner: str,
    x: np.ndarray,
    mover: Mover,
    layer: int,
    factor: float,
    asked: Asked,
    after: Config,
) -> np.ndarray:
    """Returns an array of a layer after the operation, not yet rounded to its dtype.

    `inner`: the parameter (or router state) that the array belongs to.
    """
    plan, axis, part = mover.plan, mover.axes[name].expert, name.partition("/")[0]
    y = mover.moved(name, x, layer)
    if part in VALUES:
        if name.endswith(LAST) and factor != 1:
            y = y.astype(np.float64) * factor
        return with_noise(y, axis, inner, plan, layer, asked.noise, asked.seed)
    if part == "opt_state":
        squares = OPTIMIZERS[after.optim.optimizer].squares
        # Moments of squares grow with the square of a gradient.
        power = 2 if any(word in squares for word in name.split("/")) else 1
        return with_moments(y, axis, plan, layer, asked.moments**power)
    return y


def refuse_renumbering(cfg: Config, plan: Plan) -> None:
    """Raises UserError where the router sends tokens to numbers that would be others'."""
    moe = cfg.model.moe
    if plan.changed is not None and plan.new is None:
        # Copies in the place of others: all numbers stay.
        return
    for index in plan.index:
        router = ROUTERS[moe.router]
        why = router.renumbered(moe.router_options, index.tolist(), plan.before)
        if why:
            raise UserError(f'model.moe.router = "{moe.router}" does not go with that: {why}')


def new_raw(old: Snapshot, plan: Plan) -> dict[str, Any]:
    """Returns the config of the new run. Raises UserError where there is none."""
    moe = old.config.model.moe
    num_after = plan.index.shape[1]
    if num_after == moe.num_experts and plan.slices == 1:
        return old.raw
    moe = axes.fixed(moe)
    options = moe.router_options
    if plan.choices > 1:
        options = ROUTERS[moe.router].multiplied(options, plan.choices)
        if options is None:
            raise UserError(
                f'model.moe.router = "{moe.router}" does not go with that: it has no option by '
                f"which a token takes {plan.choices} times the experts"
            )
    if moe.expert_hidden % plan.slices:
        raise UserError(
            f"model.moe.expert_hidden = {moe.expert_hidden} makes no {plan.slices} equal slices: "
            "choose a divisor, or --how copies"
        )
    changes = {
        "model.moe.num_experts": num_after,
        "model.moe.expert_hidden": moe.expert_hidden // plan.slices,
        "model.moe.shared_hidden": moe.shared_hidden,
    }
    at = f"model.moe.routers.{moe.router}"
    changes |= {f"{at}.{key}": value for key, value in dataclasses.asdict(options).items()}
    return with_values(old.raw, changes)


def weight_of_parts(
    before: Config, after: Config, old: Snapshot, mover: Mover
) -> tuple[float, str]:
    """Returns the factor on w_out by which the parts of an expert add up to it, and why there is
    none; "" = there is.

    The router of the first layer is asked, before and after, for its gates on random tokens.
    """
    choices, slices = mover.plan.choices, mover.plan.slices
    if choices == 1:
        return 1.0, ""
    names = [n for n in sorted(old.arrays) if n.startswith("params/") and n.endswith(LAST)]
    block = names[0].removeprefix("params/").removesuffix(LAST)
    was, now = [], []
    for below in (f"params/{block}/moe/router/", f"router_state/{block}{STATE}"):
        arrays = {n: x for n, x in old.arrays.items() if n.startswith(below)}
        was.append({n.removeprefix(below): x for n, x in arrays.items()})
        moved = {n: mover.moved(n, x, 0) if mover.has_experts(n) else x for n, x in arrays.items()}
        now.append({n.removeprefix(below): x for n, x in moved.items()})
    was_TE = gates.measured(before.model, *was)
    now_TEP = gates.measured(after.model, *now).reshape(*was_TE.shape, choices)
    taken = was_TE > 0
    ratio = gates.constant(now_TEP[taken] / was_TE[taken][:, None])
    if ratio is None or now_TEP[~taken].any():
        return 1.0, (
            f'router "{before.model.moe.router}": the parts of an expert do not get one share each '
            "of what it got"
        )
    # Slices add up to an expert when each has its whole gate, and copies when all have it together.
    together = 1 if slices > 1 else choices
    return 1 / (ratio * together), ""


def silenced(before: Config, after: Config, plan: Plan, arrays: Mapping[str, Any]) -> Arrays:
    """Returns the router state by which new experts stay unchosen, where the router has such."""
    if plan.new is None:
        return {}
    moe = after.model.moe
    found: Arrays = {}
    for name in arrays:
        if not (name.startswith("router_state/") and STATE in name):
            continue
        prefix = name.partition(STATE)[0] + STATE
        state = {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
        keys = keys_of(name.removeprefix("router_state/"))
        layer = int(layout.moe_layer_numbers(keys, before.model))
        quiet = ROUTERS[moe.router].silenced(moe.router_options, state, plan.new[layer])
        found |= {prefix + key: np.asarray(x) for key, x in (quiet or {}).items()}
    return found


def keys_of(name: str) -> list[Any]:
    """Returns the keys of a name: "repeats/0/embed" -> ["repeats", 0, "embed"]."""
    return [int(word) if word.isdecimal() else word for word in name.split("/")]
