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
from moe_jax.moe import losses
from moe_jax.moe.dispatch import DISPATCHERS, LOSSLESS
from moe_jax.moe.losses import LOSSES
from moe_jax.moe.ordering import AS_LISTED
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import RouterCfg
from moe_jax.parallel.compiling import of_other_platforms
from moe_jax.schema.blocks import DEPTH
from moe_jax.train_step import State, routers_learn
from moe_jax.verify import batches, reference, states
from moe_jax.verify.compare import far, largest, whole
from moe_jax.verify.program import Probe, Program

LIMIT = 1e-10
REFERENCE_LIMIT = 1e-9  # relative to the largest entry
TRIALS = 3
# A router of which no token's output depends on another token.
SAFE_ROUTER = "top_k"


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
    """Returns all checks of `program`, compiled and of one device; `begin` is its state."""
    found = [mean_loss(program, begin), *changes(program, begin)]
    if program.cfg.model.num_moe_layers:
        found += [*router_updates(program, begin), *against_reference(program)]
    return found


def served(probes: Sequence[Probe], num_experts: int) -> Check:
    """Checks that every MoE layer serves somebody.

    Where a layer serves nobody its experts have no gradient, and any two meshes agree about
    nothing.
    """
    sums = [probe.sums for probe in probes]
    # Null experts are counted behind the others.
    assigned_L = sum(s["counts"][..., :num_experts].sum((1, 2)) for s in sums)
    dropped_L = sum(s["dropped"].sum(1) for s in sums)
    note = f"{np.sum(dropped_L):.0f} of {np.sum(assigned_L):.0f} assignments dropped"
    if not all(whole(s["counts"]) for s in sums):
        note = "mixtures of all tokens: nothing is assigned, and nothing dropped"
    return Check(
        "every MoE layer serves somebody", float(np.sum(assigned_L <= dropped_L)), 0.0, note, True
    )


def mean_loss(program: Program, begin: State) -> Check:
    """Checks that the loss that is trained on is the mean over the predictions that are not
    padding.
    """
    batch = program.task.random(program.cfg, 0)
    _, probe = program.step(begin, batch)
    nll = np.average(probe.nll, weights=batches.weight(batch, probe.nll))
    claim = "the loss is the mean over predictions that are not padding"
    return Check(claim, abs(nll - probe.metrics["nll"]), LIMIT, "", True)


def changes(program: Program, begin: State) -> list[Check]:
    """Changes what must not matter to the loss of a token, and checks that it does not.

    What a router, an ordering or capacity excuses is asked again of the same model without it:
    attention has no such excuse.
    """
    model, batch = program.cfg.model, program.task.random(program.cfg, 0)
    group_rows = model.moe.group_rows if model.num_moe_layers else 1
    declared = {"padding": "", "sequences": ""}
    if model.num_moe_layers and ROUTERS[model.moe.router].sees(model.moe.router_options).batch:
        declared["sequences"] = f"the router {model.moe.router} chooses over all sequences"
    _, probe = program.step(begin, batch)
    found = batches.changes(batch, probe.nll, group_rows)
    checks = [
        _change(program, begin, name, change, declared[name]) for name, change in found.items()
    ]
    asked = {
        name: change
        for name, change in batches.causal(group_rows).items()
        if name in program.task.hidden
    }
    reason = "; ".join(causality.reasons(model)) if causality.sees(model).future else ""
    excused = [_change(program, begin, name, change, reason) for name, change in asked.items()]
    if all(check.judged for check in excused):
        return [*checks, *excused]
    plain = Program(without_excuse(program.raw), program.lengths).compile()
    start = plain.initial()
    again = [_change(plain, start, name, change, "") for name, change in asked.items()]
    return [
        *checks,
        *excused,
        *(c._replace(claim=f"{c.claim}, with top-k and dropless", note="") for c in again),
    ]


def without_excuse(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with a router, an ordering and a dispatcher that see no later token, and
    no mixture of depths.
    """
    new = copy.deepcopy(dict(raw))
    model, moe = new["model"], new["model"]["moe"]
    moe |= {"router": SAFE_ROUTER, "ordering": AS_LISTED, "dispatcher": LOSSLESS}
    safe = moe["routers"][SAFE_ROUTER]
    safe["k"] = min(safe["k"], moe["num_experts"])
    needing = [name for name, loss in LOSSES.items() if loss.needs]
    moe["losses"] |= dict.fromkeys(needing, 0.0)
    moe["adaptive"]["rate"] = 0.0
    new["eval"]["dispatcher"] = "same"
    for part in ("prefix", "period", "suffix"):
        model[part] = [block.removeprefix(DEPTH) for block in model[part]]
    return new


def router_updates(program: Program, begin: State) -> list[Check]:
    """Checks that after a step the state of each router is its own rule applied to the load of its
    own layer.
    """
    before = states.of_routers(program, begin)
    if not before or not routers_learn(program.cfg, begin.params):
        return []
    new, probe = program.step(begin, program.task.random(program.cfg, 0))
    after, moe = states.of_routers(program, new), program.cfg.model.moe
    cfg = RouterCfg(
        moe.num_experts,
        moe.router_options,
        moe.group_rows,
        program.cfg.model.vocab_size,
        lambda z: z,
    )
    found: dict[str, float] = {}
    with program.entered():
        sums = depth.without({name: jnp.asarray(z) for name, z in probe.sums.items()})
        for layer, (old, have) in enumerate(zip(before, after, strict=True)):
            totals = {name: z[layer].sum(0) for name, z in sums.items()}
            own = {name: jnp.asarray(z) for name, z in old.items() if name != "balance_weight"}
            want = dict(ROUTERS[moe.router].update(own, totals, cfg))
            if "balance_weight" in old:
                want["balance_weight"] = losses.adapt(
                    jnp.asarray(old["balance_weight"]), totals, moe.adaptive
                )
            found |= {f"{name} of layer {layer}": far(want[name], have[name]) for name in want}
    name, value = largest(found)
    return [
        Check(
            "each router's state follows the load of its own layer",
            value,
            LIMIT,
            name if value else "",
            True,
        )
    ]


def _change(
    program: Program, begin: State, name: str, change: batches.Change, declared: str
) -> Check:
    """Applies one change to several batches; `declared` is why the config excuses an effect, "" =
    it does not.
    """
    found: dict[str, float] = {}
    effect, drops = 0.0, 0.0
    for trial in range(TRIALS):
        batch = program.task.random(program.cfg, trial)
        other = change.apply(batch, np.random.default_rng(trial))
        _, before = program.step(begin, batch)
        _, after = program.step(begin, other)
        same = np.broadcast_to(change.same(batch), before.nll.shape)
        found[f"loss, {trial}"] = far(before.nll[same], after.nll[same])
        if name == "padding":
            found |= {
                f"{what}, {trial}": value for what, value in _everything(before, after).items()
            }
        effect = max(effect, far(before.nll, after.nll))
        if name == "padding":
            # Where a row has one loss, changed padding must change none at all: so the effect that
            # proves the change is that on the batch itself.
            pairs = zip(batch, other, strict=True)
            effect = max(effect, float(any(not np.array_equal(a, b) for a, b in pairs)))
        drops = max(drops, _drops(before), _drops(after))
    if not effect:
        return Check(
            change.claim,
            float("nan"),
            LIMIT,
            "nothing changed at all: the check proves nothing",
            True,
        )
    note = declared
    if (
        name == "document"
        and drops
        and not declared
        and DISPATCHERS[program.cfg.model.moe.dispatcher].drops
    ):
        note = "documents of a row share capacity, and some assignments were dropped"
    return Check(change.claim, largest(found)[1], LIMIT, note, not note)


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
    dense = reference.compare(program)
    with of_other_platforms():
        other = reference.compare(program)

    def worst(found):
        return found.where if np.isnan(found.output) else f"worst: {found.where}"

    _, accelerators = largest({"output": other.output, "gradient": other.gradient})
    return [
        Check(
            "the MoE layer equals plain arithmetic over all experts",
            dense.output,
            REFERENCE_LIMIT,
            "",
            True,
        ),
        Check("and so do its gradients", dense.gradient, REFERENCE_LIMIT, worst(dense), True),
        Check(
            "and both with the kernel of accelerators",
            accelerators,
            REFERENCE_LIMIT,
            worst(other),
            True,
        ),
    ]


def attention(length: int) -> Check:
    """Checks attention of the sequence length of the config as it is: shrunk, it would fit one
    block.
    """
    claim = "attention in blocks equals attention at once"
    return Check(
        claim,
        reference.attention_kernels(length),
        REFERENCE_LIMIT,
        f"{min(length, reference.LONGEST)} tokens",
        True,
    )
