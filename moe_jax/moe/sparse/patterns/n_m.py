"""n of every m consecutive inputs of an output (Mishra et al. 2021, arXiv:2104.08378: 2 of 4)."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe_jax.moe.sparse.patterns.contract import (
    Groups,
    Matrices,
    Pattern,
    needs_matrices,
    reshaped,
    whole,
)
from moe_jax.schema.options import NUMBER, option


@dataclasses.dataclass(frozen=True)
class Options:
    n: int = option(2, "weights that are not zero ...", NUMBER)
    m: int = option(4, "... of this many consecutive inputs", NUMBER)


def pool(experts: Matrices, options: Options) -> Groups:
    """Returns every entry, in runs of m."""
    return {name: _runs(whole(x), options.m) for name, x in experts.items()}


def _runs(x: jax.Array, m: int) -> jax.Array:
    """Returns [E, I, ...] as [E, I / m, ..., m]: runs of m consecutive inputs of one output."""
    num_experts, num_inputs = x.shape[:2]
    split = reshaped(x, num_experts, num_inputs // m, m, *x.shape[2:])
    # The run becomes the last dimension: a rule ranks along that.
    return jnp.moveaxis(split, 2, -1)


def spread(groups: Groups, experts: Matrices, options: Options) -> Matrices:
    """Returns the runs as matrices again: the inverse of `_runs`."""
    del options

    def matrix(runs: jax.Array, x: jax.Array) -> jax.Array:
        return reshaped(jnp.moveaxis(runs, -1, 2), *x.shape)

    return {name: matrix(groups[name], x) for name, x in experts.items()}


def rows(options: Options) -> int:
    """Says that every run is a row of its own."""
    del options
    return -1


def count(options: Options, number: int) -> int:
    """Returns n."""
    del number
    return options.n


def tile(options: Options) -> tuple[int, str]:
    """Says that a width must be made of whole runs."""
    return options.m, "m"


def refusals(options: Options, at: str) -> Iterator[str]:
    """Refuses to keep more than all of a run."""
    if options.n > options.m:
        yield f"{at}.n ({options.n}) must lie between 1 and {at}.m ({options.m})"


PATTERN = Pattern(
    Options,
    pool,
    spread,
    rows,
    count,
    fixed=True,
    tile=tile,
    misfit=needs_matrices,
    refusals=refusals,
)
