"""Moves experts inside of one array, as a plan (operations.py) says: the same for a weight, a
moment, a bias and a mask.
"""

import zlib

import numpy as np

from moe_jax.schema.config import Config
from moe_jax.surgery import axes
from moe_jax.surgery.operations import Plan
from moe_jax.surgery.snapshot import abstract


class Mover:
    """Moves the experts of arrays as a plan says.

    Fields:
      plan: what is done.
      axes: the dimensions of each array, by its name on disk.
    """

    def __init__(self, before: Config, after: Config, plan: Plan):
        self.plan, self.axes = plan, axes.of_state(before)
        self._wanted = abstract(after)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape that an array gets."""
        return self._wanted[name].shape

    def is_unclear(self, name: str) -> bool:
        """Returns whether nobody can say which numbers of an array are whose."""
        return name in self.axes and self.axes[name].unclear

    def has_experts(self, name: str) -> bool:
        """Returns whether a dimension of an array counts experts."""
        return name in self.axes and self.axes[name].expert >= 0

    def moved(self, name: str, x: np.ndarray, layer: int) -> np.ndarray:
        """Returns an array with the experts of a plan.

        What lies behind the experts, as null ones do, stays behind them.
        """
        axis, hidden, _ = self.axes[name]
        plan, index = self.plan, self.plan.index[layer]
        # Entries of this dimension that are no experts.
        behind = np.arange(plan.before, x.shape[axis])
        if len(behind):
            # Where experts became several, so did these.
            times = (self.shape(name)[axis] - len(index)) // len(behind)
            behind = np.repeat(behind, times)
        y = np.take(x, np.concatenate([index, behind]).astype(int), axis)
        if plan.weights is not None:
            y = _mixed(x, y, axis, plan.weights[layer])
        if plan.slices > 1 and hidden >= 0:
            y = _sliced(y, axis, hidden, plan.slices)
        return y


def _mixed(x: np.ndarray, y: np.ndarray, axis: int, weights_NE: np.ndarray) -> np.ndarray:
    """Returns `y` with its first N experts the weighted sums of those of `x`."""
    num_new, num_old = weights_NE.shape
    # Experts first, whatever the array; summed in float64, so that merging rounds once.
    old = np.moveaxis(x, axis, 0)[:num_old].astype(np.float64)
    sums = np.tensordot(weights_NE, old, 1)
    if x.dtype == bool:
        # What is alive in one of them is alive in their mean.
        sums = sums > 0
    # What lies behind the experts is in y already.
    whole = np.moveaxis(y, axis, 0).astype(sums.dtype)
    whole[:num_new] = sums
    return np.moveaxis(whole, 0, axis)


def _sliced(y: np.ndarray, axis: int, hidden: int, slices: int) -> np.ndarray:
    """Returns experts of which each has one slice of its hidden units, in turn."""
    # Experts and hidden units first.
    y = np.moveaxis(y, (axis, hidden), (0, 1))
    num, width = y.shape[0], y.shape[1] // slices
    # [experts before, the copy, the slice, units of a slice, ...].
    y = y.reshape(num // slices, slices, slices, width, *y.shape[2:])
    # The i-th of the experts in a row has the i-th slice.
    y = np.stack([y[:, i, i] for i in range(slices)], 1)
    y = y.reshape(num, width, *y.shape[3:])
    return np.moveaxis(y, (0, 1), (axis, hidden))


def with_noise(
    x: np.ndarray, axis: int, name: str, plan: Plan, layer: int, noise: float, seed: int
) -> np.ndarray:
    """Returns values with noise on the experts that changed.

    Args:
      name: of the parameter, from which the draws follow, so that averages get the same ones.
      noise: its deviation, as a share of that of the values.
    """
    if plan.changed is None or not noise:
        return x
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    y = np.moveaxis(x, axis, 0).astype(np.float64)
    # Relative to all experts, so that one of zeros gets noise, too.
    deviation = noise * y.std()
    for expert in np.flatnonzero(plan.changed[layer]):
        moved = y[expert] + deviation * rng.normal(size=y[expert].shape)
        # What a rule has cut stays cut. A router that begins with zeros gets its noise.
        is_cut = (y[expert] == 0) & ("/experts/" in name)
        y[expert] = np.where(is_cut, 0, moved)
    return np.moveaxis(y, 0, axis)


def with_moments(x: np.ndarray, axis: int, plan: Plan, layer: int, factor: float) -> np.ndarray:
    """Returns moments with a factor on those of experts that are not as they were: the changed
    ones, or all where each is split or merged.
    """
    # Every expert is as it was, with another number at most.
    moves = plan.changed is None and plan.choices == 1 and plan.weights is None
    if factor == 1 or moves:
        return x
    y = np.moveaxis(x, axis, 0).astype(np.float64)
    num = plan.index.shape[1]
    changed = np.ones(num, bool) if plan.changed is None else plan.changed[layer]
    y[:num][changed] *= factor
    return np.moveaxis(y, 0, axis)
