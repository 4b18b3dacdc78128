"""Statistics of claims: a number of the runs of one seed.

Each is a small object with the arms that it reads, so that a claim stands where its own arms are
there, whatever became of the others.
"""

import math
from typing import NamedTuple

import numpy as np

from moe_jax.study.contract import Figures, OneSeed


class Difference(NamedTuple):
    """A figure of one arm minus that of another."""

    arm: str
    against: str
    figure: str = "bits_per_byte"

    @property
    def arms(self) -> tuple[str, ...]:
        return self.arm, self.against

    def __call__(self, runs: OneSeed) -> float:
        return number(runs[self.arm], self.figure) - number(runs[self.against], self.figure)


class Interaction(NamedTuple):
    """A difference minus another one: (arm - against) - (other - other_against)."""

    arm: str
    against: str
    other: str
    other_against: str
    figure: str = "bits_per_byte"

    @property
    def arms(self) -> tuple[str, ...]:
        return self.arm, self.against, self.other, self.other_against

    def __call__(self, runs: OneSeed) -> float:
        first = Difference(self.arm, self.against, self.figure)(runs)
        return first - Difference(self.other, self.other_against, self.figure)(runs)


class Ratio(NamedTuple):
    """A figure of one arm over that of another."""

    arm: str
    against: str
    figure: str

    @property
    def arms(self) -> tuple[str, ...]:
        return self.arm, self.against

    def __call__(self, runs: OneSeed) -> float:
        return number(runs[self.arm], self.figure) / number(runs[self.against], self.figure)


class Value(NamedTuple):
    """A figure of one arm alone."""

    arm: str
    figure: str

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.arm,)

    def __call__(self, runs: OneSeed) -> float:
        return number(runs[self.arm], self.figure)


class StepRatio(NamedTuple):
    """Tells how many times fewer steps an arm takes to the last training loss of another.

    It is the speed-up of Fedus et al. 2021 (arXiv:2101.03961, figure 5): steps of `against` over
    the steps after which the curve of `arm` stays below the end of the curve of `against`. Below 1
    is not measured: an arm that never gets there has the ratio 1 at most, and is given 1.
    """

    arm: str
    against: str

    @property
    def arms(self) -> tuple[str, ...]:
        return self.arm, self.against

    def __call__(self, runs: OneSeed) -> float:
        # A curve has a line (step, loss) for each logged step.
        reference = np.asarray(runs[self.against]["curve"])
        last_step, goal = reference[-1]
        curve = np.asarray(runs[self.arm]["curve"])
        above = np.flatnonzero(curve[:, 1] > goal)
        # The arm is there from its first logged step on.
        if len(above) == 0:
            return float(last_step / curve[0, 0])
        i = above[-1]
        # It never gets there.
        if i + 1 == len(curve):
            return 1.0
        # Between the last point above the goal and the first below it the curve is a line.
        (step, loss), (next_step, next_loss) = curve[i], curve[i + 1]
        reached = step + (next_step - step) * (loss - goal) / (loss - next_loss)
        return float(last_step / reached)


class Speedup(NamedTuple):
    """Tells how many times fewer FLOPs sparse models need for the loss of dense ones.

    Both families are ladders of sizes. A line log(loss) = a - b log(x) is fitted to the dense
    ladder; it is solved for the loss of each sparse model, and the geometric mean of x(dense) /
    x(sparse) is the speed-up. Raises ValueError where the dense loss does not fall with x.

    Fields:
      sparse: the arms of the sparse ladder.
      dense: those of the dense one, at least two.
      x: the figure that counts: FLOPs of training, active or total parameters.
    """

    sparse: tuple[str, ...]
    dense: tuple[str, ...]
    x: str = "train_flops"
    figure: str = "bits_per_byte"

    @property
    def arms(self) -> tuple[str, ...]:
        return self.sparse + self.dense

    def __call__(self, runs: OneSeed) -> float:
        # 1. The line of the dense ladder, in logarithms.
        log_x = np.log([number(runs[arm], self.x) for arm in self.dense])
        log_loss = np.log([number(runs[arm], self.figure) for arm in self.dense])
        slope, constant = np.polyfit(log_x, log_loss, 1)
        if slope >= 0:
            raise ValueError("dense models that do not improve with size are no ladder")
        # 2. Where it has the loss of each sparse model.
        log_gains = []
        for arm in self.sparse:
            log_loss_of_arm = math.log(number(runs[arm], self.figure))
            log_dense_x = (log_loss_of_arm - constant) / slope
            log_sparse_x = math.log(number(runs[arm], self.x))
            log_gains.append(log_dense_x - log_sparse_x)
        # 3. The mean of logarithms is the logarithm of the geometric mean.
        return float(np.exp(np.mean(log_gains)))


class Slope(NamedTuple):
    """The slope of a figure over log2 of the arms' places, by least squares."""

    arms_in_order: tuple[str, ...]
    places: tuple[float, ...]
    figure: str = "bits_per_byte"

    @property
    def arms(self) -> tuple[str, ...]:
        return self.arms_in_order

    def __call__(self, runs: OneSeed) -> float:
        y = [number(runs[arm], self.figure) for arm in self.arms_in_order]
        slope, _ = np.polyfit(np.log2(self.places), y, 1)
        return float(slope)


def number(figures: Figures, name: str) -> float:
    """Returns a figure; NaN where the run has none, because it diverged."""
    value = figures.get(name)
    return math.nan if value is None else float(value)
