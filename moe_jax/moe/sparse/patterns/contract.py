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

# Of one layer's experts, by name.
Matrices = dict[str, jax.Array]
# A value for every group, by matrix, or under "units".
Groups = dict[str, jax.Array]
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
    """Holds all that there is to know of a pattern; `PATTERN` of its file."""

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
    """Holds a pattern with its options: what rules call.

    Trees are those of one layer's experts.
    """

    pattern: Pattern
    options: Any

    def pool(self, experts: Matrices) -> Groups:
        return self.pattern.pool(experts, self.options)

    def norms(self, experts: Matrices) -> Groups:
        """Returns the root mean square of the entries of every group, in float32 or wider."""

        def wide(x: jax.Array) -> jax.Array:
            return x.astype(wide_dtype(x.dtype))

        squares = {name: jnp.square(wide(x)) for name, x in experts.items()}
        sums = self.pool(squares)
        return {key: jnp.sqrt(z / self.size(experts, key, z)) for key, z in sums.items()}

    def size(self, experts: Matrices, key: str, groups: jax.Array) -> int:
        """Returns the entries of one group."""
        # Groups of units are of both matrices, all others of the one that they are named after.
        members = [experts[key]] if key in experts else [experts[name] for name in UNITS]
        return sum(x.size for x in members) // groups.size

    def kept(self, groups: jax.Array) -> int:
        """Returns how many groups of a row the pattern keeps."""
        return self.pattern.count(self.options, self.row_size(groups))

    def row_size(self, groups: jax.Array) -> int:
        """Returns how many groups a row has."""
        return math.prod(groups.shape[self.rows(groups) :])

    def rows(self, groups: jax.Array) -> int:
        """Returns how many leading dimensions number the rows."""
        rows = self.pattern.rows(self.options)
        # A pattern may count from the end: -1 leaves the last dimension alone for a row.
        return rows if rows > 0 else groups.ndim + rows

    def choose(self, scores: Groups, count: Callable[[jax.Array], Any]) -> Groups:
        """Returns booleans: the `count(groups)` best groups of every row; it may be traced."""
        return {key: largest(z, count(z), self.rows(z)) for key, z in scores.items()}

    def spread(self, groups: Groups, experts: Matrices) -> Matrices:
        """Returns the value of its group for every entry; of booleans, a mask.

        It is placed like the matrices.
        """
        spread = self.pattern.spread(groups, experts, self.options)
        return {name: placed_like(x, experts[name]) for name, x in spread.items()}


def largest(scores: jax.Array, count: Any, rows: int) -> jax.Array:
    """Marks the `count` largest scores of every row.

    Of equal ones it takes those with the lowest index, so exactly `count`.
    """
    row_size = math.prod(scores.shape[rows:])
    flat = reshaped(whole(scores), *scores.shape[:rows], row_size)
    count = jnp.asarray(count, jnp.int32)
    # The least score that is taken.
    # `count` may be traced, which top_k does not take: so all is sorted, and one place is read.
    place = jnp.clip(row_size - count, 0, row_size - 1)
    least = jax.lax.dynamic_index_in_dim(jnp.sort(flat, axis=-1), place, axis=-1)
    is_above = flat > least
    is_equal = flat == least
    # What lies above is taken, and so many of the equal ones that there is room for.
    room = count - is_above.sum(-1, keepdims=True, dtype=jnp.int32)
    rank_from_1 = jnp.cumsum(is_equal, -1, dtype=jnp.int32)
    chosen = is_above | (is_equal & (rank_from_1 <= room))
    return placed_like(reshaped(chosen, *scores.shape), scores)


def whole(x: jax.Array) -> jax.Array:
    """Returns the array with every expert's entries on one device; experts stay split."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
        return x
    return jax.sharding.reshard(x, P(*sharding.spec[:1]))


def reshaped(x: jax.Array, *shape: int) -> jax.Array:
    """Returns an array that is `whole` in another shape; it stays whole."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
        return x.reshape(shape)
    # An Explicit mesh does not guess where the dimensions of a reshaped array lie.
    return jax.lax.reshape(x, shape, out_sharding=P(*sharding.spec[:1]))


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns the array with the sharding of another one."""
    sharding = jax.typeof(like).sharding
    if sharding.mesh.empty:
        return x
    return jax.sharding.reshard(x, sharding)
