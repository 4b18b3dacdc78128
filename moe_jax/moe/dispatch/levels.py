"""The expert axis as one network or two: devices of one slice (or host) reach each other fast, and
slices reach each other slowly.

Device i of the axis is in slice i // fast.size, as parallel/mesh.py lays slices out.
"""

from typing import NamedTuple

import jax

from moe_jax.moe.dispatch.exchange import Groups, all_gather, reduce_scatter


class Level(NamedTuple):
    """Devices of the expert axis that exchange with each other."""

    # How many there are in one group.
    size: int
    # The distance between two neighbours of a group on the axis.
    stride: int
    # None = all devices of the axis are one group.
    groups: Groups

    def place(self) -> jax.Array:
        """Returns the place of this device in its group."""
        return jax.lax.axis_index("expert") // self.stride % self.size

    def gather(self, z: jax.Array) -> jax.Array:
        """Returns the arrays of all devices of the group, one after another."""
        return all_gather(z, "expert", 0, self.groups)

    def scatter(self, z: jax.Array) -> jax.Array:
        """Returns this device's part of the sum over the group: the reverse of `gather`."""
        return reduce_scatter(z, "expert", 0, self.groups)


def split(expert_axis: int, slices: int) -> tuple[Level, Level]:
    """Returns (between slices, within a slice) of an expert axis.

    An axis that the slices do not divide lies within one: so does a single device, and the model is
    the same there.
    """
    if slices == 1 or expert_axis % slices:
        return Level(1, expert_axis, None), Level(expert_axis, 1, None)
    fast = expert_axis // slices
    # Tuples, so that a level can be a static argument.
    within = tuple(tuple(range(one * fast, (one + 1) * fast)) for one in range(slices))
    between = tuple(tuple(range(place, expert_axis, fast)) for place in range(fast))
    return Level(slices, fast, between), Level(fast, 1, within)
