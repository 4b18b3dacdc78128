"""Which dimension of an array counts experts, and which their hidden units.

Nobody keeps a list of names: the shapes of a state are compared with those of the same run with
twice as many experts, or with experts of twice the width. So parameters, router state, moments of
every optimizer, averages and masks are found alike, of components too that nobody has heard of.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from moe_jax.moe.routing import ROUTERS
from moe_jax.schema.config import Config, MoEConfig
from moe_jax.surgery.snapshot import abstract


class Axes(NamedTuple):
    """Holds the dimensions of an array; -1 = it has none."""

    # That of the experts.
    expert: int
    # That of their hidden units.
    hidden: int
    # It changes otherwise: nobody can say which numbers are whose.
    unclear: bool = False


def of_state(cfg: Config) -> dict[str, Axes]:
    """Returns the dimensions of every array of a training run, by its name on disk."""
    moe = fixed(cfg.model.moe)
    here = abstract(with_moe(cfg, moe))
    more = abstract(with_moe(cfg, dataclasses.replace(moe, num_experts=2 * moe.num_experts)))
    wider = abstract(with_moe(cfg, dataclasses.replace(moe, expert_hidden=2 * moe.expert_hidden)))
    found = {}
    for name, x in here.items():
        expert, is_clear = _grown(x.shape, more[name].shape, moe.num_experts)
        hidden, is_clear_too = _grown(x.shape, wider[name].shape, moe.expert_hidden)
        found[name] = Axes(expert, hidden, not (is_clear and is_clear_too))
    return found


def fixed(moe: MoEConfig) -> MoEConfig:
    """Returns the same experts with all written out that follows from their number and width."""
    options = ROUTERS[moe.router].fixed(moe.num_experts, moe.router_options)
    shared = moe.shared_hidden
    if moe.shared_experts:
        shared = shared or moe.expert_hidden
    return dataclasses.replace(moe, router_options=options, shared_hidden=shared)


def with_moe(cfg: Config, moe: MoEConfig) -> Config:
    """Returns a config with other experts."""
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))


def _grown(shape: tuple[int, ...], other: tuple[int, ...], by: int) -> tuple[int, bool]:
    """Returns the dimension that is longer by `by`, -1 for none, and whether nothing else is."""
    if shape == other:
        return -1, True
    if len(shape) != len(other):
        return -1, False
    longer = np.subtract(other, shape)
    changed = np.flatnonzero(longer)
    if len(changed) == 1 and longer[changed[0]] == by:
        return int(changed[0]), True
    return -1, False
