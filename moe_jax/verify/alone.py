"""Checks on one device, for faults that every mesh would share: masks, causality, and the layer
against plain arithmetic.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.config import causality
from moe_jax.models import depth
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.moe import losses
from moe_jax.moe.dispatch import DISPATCHERS, LOSSLESS
from moe_jax.moe.losses import LOSSES
from moe_jax.moe.ordering import AS_LISTED
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import RouterCfg
from moe_jax.parallel.compiling import of_other_platforms
from moe_jax.schema.blocks import DEPTH
from moe_jax.schema.config import ModelConfig
from moe_jax.train_step import State, routers_learn
from moe_jax.verify import batches, reference, states
from moe_jax.verify.compare import far, largest, whole
from moe_jax.verify.program import Probe, Program

LIMIT = 1e-10
# Relative to the largest entry.
REFERENCE_LIMIT = 1e-9
TRIALS = 3
# A router of which no token's output depends on another token.
SAFE_ROUTER = "top_k"


class Check(NamedTuple):
    """One claim about the model on one device."""

    claim: str
    value: float
    limit: float
    note: str
    # False: the config says that it may, or it cannot be decided.
    judged: bool

    @property
    def sound(self) -> bool:
        return not self.judged or self.value <= self.limit


def checks(program: Program, begin: State) -> list[Check]:
    """Returns all checks of `program`, compiled and of one device; `begin` is its state."""
    made = [mean_loss(program, begin), *further_losses(program, begin)]
    made += changes(program, begin)
    if program.cfg.model.num_moe_layers:
        made += [*router_updates(program, begin), *against_reference(program)]
    return made


def served(probes: Sequence[Probe], num_experts: int) -> Check:
    """Checks that every MoE layer serves somebody.

    Where a layer serves nobody its experts have no gradient, and any two meshes agree about
    nothing.
    """
    sums = [probe.sums for probe in probes]
    # [L, B, C], where null experts are counted behind the others.
    # Over rows and experts, and over all steps.
    assigned_L = sum(s["counts"][..., :num_experts].sum((1, 2)) for s in sums)
    dropped_L = sum(s["dropped"].sum(1) for s in sums)
    # Idle: nothing was assigned, or all of it was dropped.
    idle_layers = np.sum(assigned_L <= dropped_L)
    note = f"{np.sum(dropped_L):.0f} of {np.sum(assigned_L):.0f} assignments dropped"
    if not all(whole(s["counts"]) for s in sums):
        note = "mixtures of all tokens: nothing is assigned, and nothing dropped"
    return Check("every MoE layer serves somebody", float(idle_layers), 0.0, note, True)


def mean_loss(program: Program, begin: State) -> Check:
    """Checks that the loss that is trained on is the mean over the predictions that are not
    padding.
    """
    batch = program.task.random(program.cfg, 0)
    _, probe = program.step(begin, batch)
    # NumPy's mean, which shares nothing with the loss of the step.
    nll = np.average(probe.nll, weights=batches.weight(batch, probe.nll))
    claim = "the loss is the mean over predictions that are not padding"
    return Check(claim, abs(nll - probe.metrics["nll"]), LIMIT, "", True)


def further_losses(program: Program, begin: State) -> list[Check]:
    """Checks that the loss of each further token is the mean over the places that have one."""
    batch = program.task.random(program.cfg, 0)
    _, probe = program.step(begin, batch)
    if not probe.further:
        return []
    differences: dict[str, float] = {}
    for k, (name, nll) in enumerate(probe.further.items(), start=1):
        counts = batches.weight_ahead(batch, nll, k)
        mean = np.average(nll, weights=counts) if counts.any() else 0.0
        differences[name] = abs(mean - probe.metrics[f"{name}_nll"])
    claim = "the loss of each further token is the mean over the places that have one"
    name, worst = largest(differences)
    return [Check(claim, worst, LIMIT, name if worst else "", True)]


def changes(program: Program, begin: State) -> list[Check]:
    """Changes what must not matter to the loss of a token, and checks that it does not.

    What a router, an ordering or capacity excuses is asked again of the same model without it:
    attention has no such excuse.
    """
    model, batch = program.cfg.model, program.task.random(program.cfg, 0)
    group_rows = model.moe.group_rows if model.num_moe_layers else 1
    excuses = {"padding": "", "sequences": ""}
    if model.num_moe_layers and ROUTERS[model.moe.router].sees(model.moe.router_options).batch:
        excuses["sequences"] = f"the router {model.moe.router} chooses over all sequences"
    _, probe = program.step(begin, batch)
    of_batch = batches.changes(batch, probe.nll, group_rows)
    made = [
        _change(program, begin, name, change, excuses[name]) for name, change in of_batch.items()
    ]

    # What a task hides from a token, such as later tokens from a language model.
    causal = batches.causal(group_rows)
    asked = {name: change for name, change in causal.items() if name in program.task.hidden}
    # Only what the config is declared to see is excused.
    excuse = "; ".join(causality.reasons(model)) if causality.sees(model).future else ""
    of_future = [_change(program, begin, name, change, excuse) for name, change in asked.items()]
    made += of_future
    if all(check.judged for check in of_future):
        return made
    # Attention and masks are asked again, of a model whose experts have no excuse.
    plain = Program(without_excuse(program.raw), program.lengths).compile()
    plain_begin = plain.initial()
    for name, change in asked.items():
        check = _change(plain, plain_begin, name, change, "")
        made.append(check._replace(claim=f"{check.claim}, with top-k and dropless", note=""))
    return made


def without_excuse(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with a router, an ordering and a dispatcher that see no later token, and
    no mixture of depths.
    """
    new = copy.deepcopy(dict(raw))
    model, moe = new["model"], new["model"]["moe"]
    moe |= {"router": SAFE_ROUTER, "ordering": AS_LISTED, "dispatcher": LOSSLESS}
    # Its k was not chosen so far, and may be more than there are experts.
    options = moe["routers"][SAFE_ROUTER]
    options["k"] = min(options["k"], moe["num_experts"])
    # Losses of sums that only some routers have.
    needing = [name for name, loss in LOSSES.items() if loss.needs]
    moe["losses"] |= dict.fromkeys(needing, 0.0)
    moe["adaptive"]["rate"] = 0.0
    # An evaluation by another dispatcher would be of another model.
    new["eval"]["dispatcher"] = "same"
    for part in ("prefix", "period", "suffix"):
        model[part] = [block.replace(DEPTH, "") for block in model[part]]
    return new


def router_updates(program: Program, begin: State) -> list[Check]:
    """Checks that after a step the state of each router is its own rule applied to the load of its
    own layer.
    """
    before = states.of_routers(program, begin)
    if not before or not routers_learn(program.cfg, begin.params):
        return []
    # One step with the routers as they are; what it counted is what the rule is applied to.
    new, probe = program.step(begin, program.task.random(program.cfg, 0))
    after = states.of_routers(program, new)
    differences: dict[str, float] = {}
    with program.entered():
        # What depth blocks count beside the routers is no matter of theirs.
        sums = depth.without({name: jnp.asarray(z) for name, z in probe.sums.items()})
        for layer, (old, have) in enumerate(zip(before, after, strict=True)):
            # Rows are added up here, in NumPy: the step adds them up on the mesh.
            totals = {name: z[layer].sum(0) for name, z in sums.items()}
            want = _updated(program.cfg.model, old, totals)
            for name, value in want.items():
                differences[f"{name} of layer {layer}"] = far(value, have[name])
    name, worst = largest(differences)
    claim = "each router's state follows the load of its own layer"
    return [Check(claim, worst, LIMIT, name if worst else "", True)]


def _updated(
    model: ModelConfig, old: Mapping[str, np.ndarray], totals: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what the rules of one layer make of its state and its totals of a step."""
    moe = model.moe
    cfg = RouterCfg(
        moe.num_experts, moe.router_options, moe.group_rows, model.vocab_size, lambda z: z
    )
    # The weight of the balance losses lies beside the router's own state.
    own = {name: jnp.asarray(z) for name, z in old.items() if name != "balance_weight"}
    new = dict(ROUTERS[moe.router].update(own, totals, cfg))
    if "balance_weight" in old:
        weight = jnp.asarray(old["balance_weight"])
        new["balance_weight"] = losses.adapt(weight, totals, moe.adaptive)
    return new


def _change(
    program: Program, begin: State, name: str, change: batches.Change, excuse: str
) -> Check:
    """Applies one change to several batches; `excuse` is why the config excuses an effect, "" = it
    does not.
    """
    differences: dict[str, float] = {}
    effect, drops = 0.0, 0.0
    for trial in range(TRIALS):
        batch = program.task.random(program.cfg, trial)
        other = change.apply(batch, np.random.default_rng(trial))
        _, before = program.step(begin, batch)
        _, after = program.step(begin, other)
        # Only the losses that the change must not touch are compared.
        same = np.broadcast_to(change.same(batch), before.nll.shape)
        differences[f"loss, {trial}"] = far(before.nll[same], after.nll[same])
        # Some loss must move, or the change was none and the check proves nothing.
        effect = max(effect, far(before.nll, after.nll))
        if name == "padding":
            for what, difference in _everything(before, after).items():
                differences[f"{what}, {trial}"] = difference
            # Where a row has one loss, changed padding must change none at all: so the effect that
            # proves the change is that on the batch itself.
            pairs = zip(batch, other, strict=True)
            effect = max(effect, float(any(not np.array_equal(a, b) for a, b in pairs)))
        drops = max(drops, _drops(before), _drops(after))
    if not effect:
        note = "nothing changed at all: the check proves nothing"
        return Check(change.claim, float("nan"), LIMIT, note, True)
    note = excuse
    # An earlier document takes places first, so a later one may lose an assignment to it.
    shares_capacity = name == "document" and DISPATCHERS[program.cfg.model.moe.dispatcher].drops
    if shares_capacity and drops and not excuse:
        note = "documents of a row share capacity, and some assignments were dropped"
    _, worst = largest(differences)
    return Check(change.claim, worst, LIMIT, note, not note)


def _everything(a: Probe, b: Probe) -> dict[str, float]:
    """Returns how far loss, statistics and gradients are apart: padding may change none of them."""
    pairs = {"loss": (a.loss, b.loss)}
    pairs |= {name: (a.sums[name], b.sums[name]) for name in a.sums}
    pairs |= {name: (a.grads[name], b.grads[name]) for name in a.grads}
    return {name: far(*pair) for name, pair in pairs.items()}


def _drops(probe: Probe) -> float:
    """Returns how many assignments were dropped."""
    return float(probe.sums["dropped"].sum()) if "dropped" in probe.sums else 0.0


def against_reference(program: Program) -> list[Check]:
    """Checks the MoE layer against plain arithmetic, with the kernels of CPUs and accelerators."""
    here = reference.compare(program)
    # The kernels of accelerators are compiled for this CPU.
    with of_other_platforms():
        there = reference.compare(program)

    def worst(compared):
        # Where nothing could be compared, `where` says why.
        return compared.where if np.isnan(compared.output) else f"worst: {compared.where}"

    _, accelerators = largest({"output": there.output, "gradient": there.gradient})
    values = {
        "the MoE layer equals plain arithmetic over all experts": (here.output, ""),
        "and so do its gradients": (here.gradient, worst(here)),
        "and both with the kernel of accelerators": (accelerators, worst(there)),
    }
    return [
        Check(claim, value, REFERENCE_LIMIT, note, True) for claim, (value, note) in values.items()
    ]


def attention(length: int, model: ModelConfig) -> Check:
    """Checks attention of the sequence length of the config as it is: shrunk, it would fit one
    block. `model`: of which it has the cap on scores, and the biases.
    """
    kinds = [(ATTENTIONS[name], model.with_attention(name)) for name in set(model.attentions)]
    masks = model.kind_options.masks
    found = [kind.buckets(mask, own.attention_options) for kind, own in kinds for mask in masks]
    biases = [buckets for buckets in found if buckets is not None]
    claim = "attention in blocks equals attention at once"
    note = f"{min(length, reference.LONGEST)} tokens"
    worst = reference.attention_kernels(length, model.attention_cap, biases)
    return Check(claim, worst, REFERENCE_LIMIT, note, True)
