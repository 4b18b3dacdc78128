"""Which entries of an expert's matrices are zero together: a pattern pools entries into groups, and
spreads a choice over entries.

A pattern never decides: a rule (rules.py) scores the groups and keeps the `count` best of every row
of groups, or those above a threshold. Everything is global view on an Explicit mesh and the same on
every one: what has to see a whole row is first gathered to whole experts.

Matrices are [E, I, ..., O]: experts, input, output (w_in [E, D, P, F], w_out [E, F, D]; an expert
of one vector is [E, I]). Groups are {key: array}, where `rows` of the leading dimensions number
independent rows, and a row is what follows.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.parallel.mesh import P
from moe_jax.precision import wide_dtype

Matrices = dict[str, jax.Array]  # of one layer's experts, by name
Groups = dict[str, jax.Array]  # a value for every group, by matrix, or under "units"
UNITS = ("w_in", "w_out")


def no_tile(options: Any) -> tuple[int, str] | None:
    """Says that a pattern goes with any width."""
    del options
    return None


def fits_all(layer: Mapping[str, int]) -> str:
    """Says that a pattern goes with any expert."""
    del layer
    return ""


def no_refusals(options: Any, at: str) -> Iterator[str]:
    """Refuses nothing."""
    del options, at
    yield from ()


class Pattern(NamedTuple):
    """All that there is to know of a pattern; `PATTERN` of its file."""

    # The frozen dataclass of its block in the config.
    options: type
    # (matrices, options) -> sums over the entries of every group.
    pool: Callable[[Matrices, Any], Groups]
    # (groups, matrices, options) -> the value of its group for every entry.
    spread: Callable[[Groups, Matrices, Any], Matrices]
    # Leading dimensions of a group array that number its rows.
    rows: Callable[[Any], int]
    # (options, n) -> groups kept of a row of n.
    count: Callable[[Any, int], int]
    # It keeps the same few entries' number in every run, whatever their magnitude.
    fixed: bool = False
    # Its groups are whole hidden units.
    of_units: bool = False
    # (size, name of the option): d_model and expert_hidden must be multiples of the size.
    tile: Callable[[Any], tuple[int, str] | None] = no_tile
    # {name of a matrix: dimensions} of a layer's experts -> why they do not fit; "" = they do.
    misfit: Callable[[Mapping[str, int]], str] = fits_all
    # Yields what is wrong with its options together; `at` is the path of its block.
    refusals: Callable[[Any, str], Iterator[str]] = no_refusals


def by_density(options: Any, number: int) -> int:
    """Returns the groups that a row of `number` keeps: density * number, rounded, at least one."""
    return max(1, round(options.density * number))


def one_row(options: Any) -> int:
    """Says that all groups of an expert's matrix are one row."""
    del options
    return 1


def needs_matrices(layer: Mapping[str, int]) -> str:
    """Says that an expert must be made of matrices."""
    if min(layer.values()) < 3:
        return "an expert is one vector, which has no inputs and outputs to make blocks of"
    return ""


class Shaped(NamedTuple):
    """A pattern with its options: what rules call. Trees are those of one layer's experts."""

    pattern: Pattern
    options: Any

    def pool(self, experts: Matrices) -> Groups:
        return self.pattern.pool(experts, self.options)

    def norms(self, experts: Matrices) -> Groups:
        """The root mean square of the entries of every group, in float32 or wider."""

        def wide(x):
            return x.astype(wide_dtype(x.dtype))

        sums = self.pool({name: jnp.square(wide(x)) for name, x in experts.items()})
        return {key: jnp.sqrt(z / self.size(experts, key, z)) for key, z in sums.items()}

    def size(self, experts: Matrices, key: str, groups: jax.Array) -> int:
        """Entries of one group."""
        members = [experts[key]] if key in experts else [experts[name] for name in UNITS]
        return sum(x.size for x in members) // groups.size

    def kept(self, groups: jax.Array) -> int:
        """How many groups of a row the pattern keeps."""
        return self.pattern.count(self.options, self.row_size(groups))

    def row_size(self, groups: jax.Array) -> int:
        return math.prod(groups.shape[self.rows(groups) :])

    def rows(self, groups: jax.Array) -> int:
        rows = self.pattern.rows(self.options)
        return rows if rows > 0 else groups.ndim + rows

    def choose(self, scores: Groups, count: Callable[[jax.Array], Any]) -> Groups:
        """The `count(groups)` best groups of every row, a number that may be traced."""
        return {key: largest(z, count(z), self.rows(z)) for key, z in scores.items()}

    def spread(self, groups: Groups, experts: Matrices) -> Matrices:
        """The value of its group for every entry, placed like the matrices; of booleans, a mask."""
        spread = self.pattern.spread(groups, experts, self.options)
        return {name: placed_like(x, experts[name]) for name, x in spread.items()}


def largest(scores: jax.Array, count: Any, rows: int) -> jax.Array:
    """Marks the `count` largest scores of every row; of equal ones those with the lowest index, so
    exactly `count`.
    """
    whole_rows = whole(scores)
    flat = reshaped(whole_rows, *scores.shape[:rows], math.prod(scores.shape[rows:]))
    number = flat.shape[-1]
    at = jnp.clip(number - jnp.asarray(count, jnp.int32), 0, number - 1)
    least = jax.lax.dynamic_index_in_dim(jnp.sort(flat, axis=-1), at, axis=-1)
    above, level = flat > least, flat == least
    room = jnp.asarray(count, jnp.int32) - above.sum(-1, keepdims=True, dtype=jnp.int32)
    chosen = above | (level & (jnp.cumsum(level, -1, dtype=jnp.int32) <= room))
    return placed_like(reshaped(chosen, *scores.shape), scores)


def whole(x: jax.Array) -> jax.Array:
    """The same array with every expert's entries on one device; experts stay split."""
    sharding = jax.typeof(x).sharding
    return x if sharding.mesh.empty else jax.sharding.reshard(x, P(*sharding.spec[:1]))


def reshaped(x: jax.Array, *shape: int) -> jax.Array:
    """Returns an array that is `whole` in another shape; it stays whole."""
    sharding = jax.typeof(x).sharding
    return (
        x.reshape(shape)
        if sharding.mesh.empty
        else jax.lax.reshape(x, shape, out_sharding=P(*sharding.spec[:1]))
    )


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns the array with the sharding of another one."""
    sharding = jax.typeof(like).sharding
    return x if sharding.mesh.empty else jax.sharding.reshard(x, sharding)
