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
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.parallel.mesh import P

Matrices = dict[str, jax.Array]  # of one layer's experts, by name
Groups = dict[str, jax.Array]  # a value for every group, by matrix, or under "units"
UNITS = ("w_in", "w_out")


class Pattern(NamedTuple):
    """One line of PATTERNS."""

    pool: Callable[[Matrices, Mapping[str, Any]], Groups]  # sums over the entries of every group
    spread: Callable[
        [Groups, Matrices, Mapping[str, Any]], Matrices
    ]  # the value of its group for every entry
    rows: Callable[
        [Mapping[str, Any]], int
    ]  # leading dimensions of a group array that number its rows
    count: Callable[[Mapping[str, Any], int], int]  # groups kept of a row of n


def by_density(options: Mapping[str, Any], number: int) -> int:
    """The groups that a row of `number` keeps: density * number, rounded, at least one."""
    return max(1, round(options["density"] * number))


def _each(
    f: Callable[[jax.Array, int], jax.Array], block: str
) -> Callable[[Matrices, Mapping[str, Any]], Groups]:
    return lambda experts, options: {
        name: f(whole(x), options[block]) for name, x in experts.items()
    }


# N:M


def _runs(x: jax.Array, m: int) -> jax.Array:
    """[E, I, ...] -> [E, I / m, ..., m]: runs of m consecutive inputs of one output."""
    return jnp.moveaxis(reshaped(x, x.shape[0], x.shape[1] // m, m, *x.shape[2:]), 2, -1)


def _from_runs(groups: Groups, experts: Matrices, options: Mapping[str, Any]) -> Matrices:
    return {
        name: reshaped(jnp.moveaxis(groups[name], -1, 2), *x.shape) for name, x in experts.items()
    }


# Blocks


def _blocks(x: jax.Array, b: int) -> jax.Array:
    """[E, I, ..., O] -> sums of b x b blocks [E, Q, O / b, I / b], where Q numbers what lies
    between I and O (gate and up).
    """
    e, i, o = x.shape[0], x.shape[1], x.shape[-1]
    return (
        reshaped(x, e, i // b, b, x.size // (e * i * o), o // b, b)
        .sum((2, 5))
        .transpose(0, 2, 3, 1)
    )


def _from_blocks(groups: Groups, experts: Matrices, options: Mapping[str, Any]) -> Matrices:
    b = options["block"]

    def one(group: jax.Array, x: jax.Array) -> jax.Array:
        y = group.transpose(0, 3, 1, 2)[:, :, None, :, :, None]  # [E, I / b, 1, Q, O / b, 1]
        y = jnp.broadcast_to(y, (y.shape[0], y.shape[1], b, y.shape[3], y.shape[4], b))
        return reshaped(y, *x.shape)

    return {name: one(groups[name], x) for name, x in experts.items()}


# Hidden units


def _units(experts: Matrices, options: Mapping[str, Any]) -> Groups:
    """Unit f of an expert is w_in[e, :, :, f] together with w_out[e, f, :]: without one the other
    does nothing.
    """
    w_in, w_out = (experts[name] for name in UNITS)
    return {"units": w_in.sum(tuple(range(1, w_in.ndim - 1))) + w_out.sum(2)}


def _from_units(groups: Groups, experts: Matrices, options: Mapping[str, Any]) -> Matrices:
    unit_EF, (w_in, w_out) = groups["units"], (experts[name] for name in UNITS)
    middle = jnp.expand_dims(unit_EF, tuple(range(1, w_in.ndim - 1)))
    return {
        "w_in": jnp.broadcast_to(middle, w_in.shape),
        "w_out": jnp.broadcast_to(unit_EF[:, :, None], w_out.shape),
    }


PATTERNS: dict[str, Pattern] = {
    # single entries, anywhere in an expert's matrix
    "unstructured": Pattern(
        lambda experts, options: dict(experts),
        lambda groups, experts, options: groups,
        lambda options: 1,
        by_density,
    ),
    # n of every m consecutive inputs of an output (Mishra et al. 2021, arXiv:2104.08378: 2 of 4)
    "n_m": Pattern(
        _each(_runs, "m"), _from_runs, lambda options: -1, lambda options, number: options["n"]
    ),
    # b x b blocks; balanced: as many for every column of blocks, so that their products are one
    # batch
    "blocks": Pattern(
        _each(_blocks, "block"),
        _from_blocks,
        lambda options: -1 if options["balanced"] else 1,
        by_density,
    ),
    # whole hidden units, which `convert compact` removes
    "units": Pattern(_units, _from_units, lambda options: 1, by_density),
}


class Shaped(NamedTuple):
    """A pattern with its options: what rules call. Trees are those of one layer's experts."""

    pattern: Pattern
    options: Mapping[str, Any]

    def pool(self, experts: Matrices) -> Groups:
        return self.pattern.pool(experts, self.options)

    def norms(self, experts: Matrices) -> Groups:
        """The root mean square of the entries of every group, in float32 or wider."""

        def wide(x):
            return x.astype(jnp.promote_types(x.dtype, jnp.float32))

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
    place = jax.typeof(x).sharding
    return x if place.mesh.empty else jax.sharding.reshard(x, P(*place.spec[:1]))


def reshaped(x: jax.Array, *shape: int) -> jax.Array:
    """Of an array that is `whole`, and stays so."""
    place = jax.typeof(x).sharding
    return (
        x.reshape(shape)
        if place.mesh.empty
        else jax.lax.reshape(x, shape, out_sharding=P(*place.spec[:1]))
    )


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    place = jax.typeof(like).sharding
    return x if place.mesh.empty else jax.sharding.reshard(x, place)
