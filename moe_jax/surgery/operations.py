"""What is done to the experts of a run: `python -m moe_jax convert surgery OPERATION`.

An operation is a function from the experts that are there to a Plan: where each new expert comes
from, in each layer. surgery/operate.py does it to every array of the state alike.

Shapes: L MoE layers, E experts before, N experts after.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import UserError

GONE = "experts that had tokens are gone"
MIXED = "the mean of experts is none of them"
REVIVED = "what the dead experts said is lost, and their copies compete with their parents"


class There(NamedTuple):
    """Holds what an operation may know of the experts that are there."""

    num_layers: int
    num_experts: int
    # Assignments of each expert on held-out text, [L, E]; None = nobody counted.
    load: np.ndarray | None


class Plan(NamedTuple):
    """Holds where the experts of every layer come from.

    Fields:
      before: E, how many there were.
      index: [L, N], the old number of each new expert; of a merged one the first.
      weights: [L, N, E], the share of each old expert in a new one; None = copies.
      slices: experts in a row that have a piece of the hidden units each; 1 = they have all.
      choices: by how much more experts a token takes.
      changed: [L, N], which new experts get noise.
      new: [L, N], which are to stay unchosen until a bias lifts them, where the router can do so.
      loss: why the function changes whatever the router does; "" = it need not.
    """

    before: int
    index: np.ndarray
    weights: np.ndarray | None = None
    slices: int = 1
    choices: int = 1
    changed: np.ndarray | None = None
    new: np.ndarray | None = None
    loss: str = ""


def permute(there: There, order: Sequence[int] | None, seed: int) -> Plan:
    """Returns the plan of other numbers; `order`: the old number of each, None = drawn."""
    num = there.num_experts
    if order is None:
        rng = np.random.default_rng(seed)
        return Plan(num, np.stack([rng.permutation(num) for _ in range(there.num_layers)]))
    if sorted(order) != list(range(num)):
        raise UserError(
            f"--order {','.join(map(str, order))} must name each of the experts 0 to {num - 1} once"
        )
    return Plan(there.num_experts, _everywhere(there, order))


def split(there: There, parts: int, how: str) -> Plan:
    """Returns the plan by which each expert becomes several, with its router weights each.

    `how`: "slices" of its hidden units (He et al. 2024, arXiv:2410.07524), or whole "copies". A
    token takes all parts of an expert that it took.
    """
    # Parts of one expert stand side by side: 0 0 1 1 2 2.
    index = np.repeat(np.arange(there.num_experts), parts)
    slices = parts if how == "slices" else 1
    return Plan(there.num_experts, _everywhere(there, index), slices=slices, choices=parts)


def grow(there: There, num: int, like: Sequence[int] | None) -> Plan:
    """Returns the plan with more experts, copies of those that are named, or of the busiest."""
    more = num - there.num_experts
    if more < 1:
        raise UserError(f"--to {num} must be more than the {there.num_experts} experts there are")
    if like is not None:
        refuse_strangers("--like", like, there)
        # Where fewer are named than are wanted, they are taken in turn.
        parents = np.tile(np.resize(like, more), (there.num_layers, 1))
    else:
        order = _busiest_first(there, "--like")
        parents = np.stack([np.resize(layer, more) for layer in order])
    # Experts that were there keep their numbers; the copies stand behind them.
    own = _everywhere(there, range(there.num_experts))
    index = np.concatenate([own, parents], 1)
    is_new = np.broadcast_to(np.arange(num) >= there.num_experts, index.shape)
    return Plan(there.num_experts, index, changed=is_new, new=is_new)


def prune(there: There, gone: Sequence[int] | None, keep: int | None) -> Plan:
    """Returns the plan without the named experts, or with the `keep` busiest of each layer."""
    num = there.num_experts
    if gone is not None:
        refuse_strangers("--experts", gone, there)
        left = [expert for expert in range(num) if expert not in gone]
        if not left:
            raise UserError("--experts names all of them: one must stay")
        return Plan(there.num_experts, _everywhere(there, left), loss=GONE)
    if keep is None or not 1 <= keep < num:
        raise UserError(f"--keep {keep} must lie between 1 and {num - 1}: there are {num} experts")
    order = _busiest_first(there, "--experts")
    # Those that stay keep their order, so that numbers change as little as possible.
    return Plan(num, np.sort(order[:, :keep], 1), loss=GONE)


def merge(there: There, groups: Sequence[Sequence[int]], by_load: bool) -> Plan:
    """Returns the plan by which the experts of each group become their mean, weighted by their
    loads if `by_load`; the others stay, and a group has the place of its first.
    """
    named = [expert for group in groups for expert in group]
    refuse_strangers("--groups", named, there)
    if len(set(named)) < len(named):
        raise UserError("--groups names an expert twice")
    if by_load and there.load is None:
        raise UserError("--weights load needs held-out text of a language model")
    # Whom each new expert is made of, by the lowest number among them.
    members = {min(group): sorted(group) for group in groups}
    others = set(range(there.num_experts)) - set(named)
    members |= {expert: [expert] for expert in others}
    first = sorted(members)
    weights = np.zeros((there.num_layers, len(first), there.num_experts))
    for layer in range(there.num_layers):
        for new, expert in enumerate(first):
            group = members[expert]
            share = np.ones(len(group))
            # A group that no token chose has no loads to weigh by.
            if by_load and there.load is not None and there.load[layer, group].sum() > 0:
                share = there.load[layer, group].astype(float)
            weights[layer, new, group] = share / share.sum()
    return Plan(there.num_experts, _everywhere(there, first), weights, loss=MIXED)


def revive(there: There, dead: Sequence[int] | None, below: float | None) -> Plan:
    """Returns the plan by which dead experts become copies of busy ones, the deadest of the
    busiest.

    `dead`: their numbers; None = those with less than `below` times the mean load of their layer.
    """
    if dead is not None:
        refuse_strangers("--experts", dead, there)
    order = _busiest_first(there, "nothing else")
    index = _everywhere(there, range(there.num_experts)).copy()
    for layer, busy_first in enumerate(order):
        if dead is not None:
            chosen = set(dead)
        else:
            # Without loads there is no order.
            assert there.load is not None
            load = there.load[layer]
            chosen = set(np.flatnonzero(load < (below or 0) * load.mean()).tolist())
        busy = [expert for expert in busy_first if expert not in chosen]
        deadest_first = [expert for expert in busy_first[::-1] if expert in chosen]
        if not busy:
            raise UserError("no expert is left to copy: name fewer as dead")
        # Where more are dead than busy, the busiest are copied again.
        for i, expert in enumerate(deadest_first):
            index[layer, expert] = busy[i % len(busy)]
    changed = index != np.arange(there.num_experts)
    if not changed.any():
        raise UserError("no expert is dead by that measure: nothing to revive")
    return Plan(there.num_experts, index, changed=changed, loss=REVIVED)


def refuse_strangers(flag: str, experts: Sequence[int], there: There) -> None:
    """Raises UserError for a number that no expert has."""
    for expert in experts:
        if not 0 <= expert < there.num_experts:
            raise UserError(
                f"{flag}: there is no expert {expert}, they are 0 to {there.num_experts - 1}"
            )


def _everywhere(there: There, index: Any) -> np.ndarray:
    """Returns the same numbers in all layers, [L, N]."""
    return np.tile(np.asarray(list(index), int), (there.num_layers, 1))


def _busiest_first(there: There, instead: str) -> np.ndarray:
    """Returns the experts of each layer by falling load, [L, E]; of two alike the lower first."""
    if there.load is None:
        raise UserError(
            "the loads of experts are counted on held-out text, which this run has not: name "
            f"experts with {instead}"
        )
    return np.argsort(-there.load, axis=1, kind="stable")
