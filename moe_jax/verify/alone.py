"""Checks on one device, for faults that every mesh would share: masks, causality, and the layer against plain arithmetic."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.moe import causality
from moe_jax.moe.routing import ROUTERS
from moe_jax.state import State
from moe_jax.verify import batches, reference
from moe_jax.verify.compare import far
from moe_jax.verify.program import Probe, Program

LIMIT = 1e-10
REFERENCE_LIMIT = 1e-9  # relative to the largest entry
TRIALS = 3


class Check(NamedTuple):
    """One claim about the model on one device."""

    claim: str
    value: float
    limit: float
    note: str
    judged: bool  # False: the config says that it may, or it cannot be decided

    @property
    def sound(self) -> bool:
        return not self.judged or self.value <= self.limit


def checks(program: Program, begin: State) -> list[Check]:
    """`program` is compiled and has one device; `begin` is its state."""
    found = [mean_loss(program, begin), *changes(program, begin)]
    if program.cfg.model.num_moe_layers:
        found += against_reference(program)
    return found


def served(probes: Sequence[Probe], num_experts: int) -> Check:
    """Where a layer serves nobody its experts have no gradient, and any two meshes agree about nothing."""
    sums = [probe.sums for probe in probes]
    assigned_L = sum(s["counts"][..., :num_experts].sum((1, 2)) for s in sums)  # null experts are counted behind
    dropped_L = sum(s["dropped"].sum(1) for s in sums)
    note = f"{np.sum(dropped_L):.0f} of {np.sum(assigned_L):.0f} assignments dropped"
    return Check("every MoE layer serves somebody", float(np.sum(assigned_L <= dropped_L)), 0.0, note, True)


def mean_loss(program: Program, begin: State) -> Check:
    """The task's loss that is trained on is the mean over the predictions that are not padding."""
    inputs = program.task.random(program.cfg, 0)
    _, probe = program.step(begin, inputs)
    nll = np.average(probe.nll, weights=batches.weight(inputs, probe.nll))
    claim = "the loss is the mean over predictions that are not padding"
    return Check(claim, abs(nll - probe.metrics["nll"]), LIMIT, "", True)


def changes(program: Program, begin: State) -> list[Check]:
    """What must not matter to the loss of a token, changed, and how much it does."""
    model, inputs = program.cfg.model, program.task.random(program.cfg, 0)
    declared = {"padding": "", "future": "", "sequences": "", "document": ""}
    if causality.sees(model).future:
        declared["future"] = "; ".join(causality.reasons(model))
    declared["document"] = declared["future"]
    if model.num_moe_layers and ROUTERS[model.moe.router].sees(model.moe.router_options).batch:
        declared["sequences"] = f"the router {model.moe.router} chooses over all sequences"
    group_rows = model.moe.group_rows if model.num_moe_layers else 1
    _, probe = program.step(begin, inputs)
    found = batches.changes(inputs, probe.nll, group_rows, program.cfg.task == "lm")
    return [_change(program, begin, name, change, declared[name]) for name, change in found.items()]


def _change(program: Program, begin: State, name: str, change: batches.Change, declared: str) -> Check:
    worst, effect, drops = 0.0, 0.0, 0.0
    for trial in range(TRIALS):
        inputs = program.task.random(program.cfg, trial)
        other = change.apply(inputs, np.random.default_rng(trial))
        (_, before), (_, after) = program.step(begin, inputs), program.step(begin, other)
        same = np.broadcast_to(change.same(inputs), before.nll.shape)
        deviation = far(before.nll[same], after.nll[same])
        if name == "padding":
            deviation = max(deviation, _everything(before, after))
        worst = deviation if not deviation <= worst else worst
        effect = max(effect, far(before.nll, after.nll))
        if name == "padding":  # where a row has one loss, padding that is changed must change none at all
            effect = max(effect, float(any(not np.array_equal(a, b) for a, b in zip(inputs, other, strict=True))))
        drops = max(drops, _drops(before), _drops(after))
    if not effect:
        return Check(change.claim, float("nan"), LIMIT, "nothing changed at all: the check proves nothing", True)
    note = declared
    if name == "document" and drops and not declared and program.cfg.model.moe.dispatcher == "capacity":
        note = "documents of a row share capacity, and some assignments were dropped"
    return Check(change.claim, worst, LIMIT, note, not note)


def _everything(a: Probe, b: Probe) -> float:
    """Padding must change neither the loss nor a statistic nor a gradient."""
    sums = [far(a.sums[name], b.sums[name]) for name in a.sums]
    grads = [far(a.grads[name], b.grads[name]) for name in a.grads]
    return max([abs(a.loss - b.loss), *sums, *grads], key=lambda z: np.inf if np.isnan(z) else z)


def _drops(probe: Probe) -> float:
    return float(probe.sums["dropped"].sum()) if "dropped" in probe.sums else 0.0


def against_reference(program: Program) -> list[Check]:
    claims = "the MoE layer equals plain arithmetic over all experts", "and so do its gradients"
    try:
        dense = reference.compare(program)
    except reference.NoGates:
        return [Check(claims[0], 0.0, 0.0, "the router mixes tokens: there are no gates", False)]
    worst = dense.where if np.isnan(dense.output) else f"worst: {dense.where}"
    return [
        Check(claims[0], dense.output, REFERENCE_LIMIT, "", True),
        Check(claims[1], dense.gradient, REFERENCE_LIMIT, worst, True),
    ]
