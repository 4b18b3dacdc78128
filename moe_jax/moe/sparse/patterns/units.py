"""Whole hidden units, which `convert compact` removes."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from moe_jax.moe.sparse.patterns.contract import (
    UNITS,
    Groups,
    Matrices,
    Pattern,
    by_density,
    one_row,
)
from moe_jax.schema.options import PART, option


@dataclasses.dataclass(frozen=True)
class Options:
    density: float = option(0.25, "fraction of each expert's hidden units", PART)


def pool(experts: Matrices, options: Options) -> Groups:
    """Returns the sums of hidden units.

    Unit f of an expert is w_in[e, :, :, f] together with w_out[e, f, :]: without one the other
    does nothing.
    """
    del options
    w_in, w_out = (experts[name] for name in UNITS)
    # What lies between experts and hidden units: D, and gate and up.
    between = tuple(range(1, w_in.ndim - 1))
    return {"units": w_in.sum(between) + w_out.sum(2)}


def spread(groups: Groups, experts: Matrices, options: Options) -> Matrices:
    """Returns the value of its unit for every entry."""
    del options
    unit_EF = groups["units"]
    w_in, w_out = (experts[name] for name in UNITS)
    between = tuple(range(1, w_in.ndim - 1))
    return {
        "w_in": jnp.broadcast_to(jnp.expand_dims(unit_EF, between), w_in.shape),
        "w_out": jnp.broadcast_to(unit_EF[:, :, None], w_out.shape),
    }


def misfit(layer: Mapping[str, int]) -> str:
    """Says that an expert must be a network with a hidden layer."""
    if set(UNITS) <= set(layer):
        return ""
    return (
        "hidden units are rows of w_out and columns of w_in, and the experts have "
        f"{', '.join(layer)}"
    )


PATTERN = Pattern(Options, pool, spread, one_row, by_density, of_units=True, misfit=misfit)
