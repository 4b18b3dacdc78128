"""What an ablation declares: a question, its arms, and the claims that are judged.

A `Study` is a declaration of a few lines. It trains nothing: `expand.py` makes cells of it,
`local.py` and `slurm.py` train them, `judge.py` gives the verdict, `results.py` writes it.

A figure is a number that a run leaves (`train_cells.py`); `OneSeed` has those of every arm that was
trained with one seed, so the arms in it have seen the same data in the same order.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from moe_jax.schema.config import Config

# Dotted keys of a config and their values.
Changes = Mapping[str, Any]
Figures = Mapping[str, Any]
# The figures of each arm's run, of one seed.
OneSeed = Mapping[str, Figures]

RATE = "optim.learning_rate"
# How a claim is meant: the statistic lies below or above the bound, or within -bound to bound.
BELOW, ABOVE, WITHIN = "below", "above", "within"


class Statistic(Protocol):
    """A number of the runs of one seed; `arms` are those that it reads."""

    @property
    def arms(self) -> tuple[str, ...]: ...

    def __call__(self, runs: OneSeed) -> float: ...


class Claim(NamedTuple):
    """Holds what a paper says, as a statistic that lies on one side of a bound."""

    says: str
    statistic: Statistic
    holds: str
    bound: float
    unit: str = "bits per byte"
    # What the paper measured, with its size; "" = nothing that can be put beside ours.
    paper: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A question about models, as a grid of runs and claims about them.

    An arm that sets optim.learning_rate keeps it: the rate is then a part of the question. The rate
    of every other arm is searched, from `rate` on in steps of `factor` (`bracket.py`).
    """

    name: str
    question: str
    # The paper, and the figure or table in it that the study repeats.
    paper: str
    # What is the same in all arms that are compared; it stands in the title of every plot.
    equal: str
    # The first one is drawn as the reference.
    arms: Mapping[str, Changes]
    claims: tuple[Claim, ...]
    # Arms that begin from a dense model: the changed keys of that model, its learning rate among
    # them. It is trained before the arm and upcycled (begun.py).
    parents: Mapping[str, Changes] = dataclasses.field(default_factory=dict)
    # Changed keys of every arm.
    base: Changes = dataclasses.field(default_factory=dict)
    config: str = "base"
    seeds: tuple[int, ...] = (0, 1, 2)
    rate: float = 4e-3
    factor: float = 2.0
    # Seeds of the search: a rate is judged by the mean of their runs.
    tuning_seeds: tuple[int, ...] = (1000, 1001, 1002)
    # The figure by which learning rates are chosen and arms are drawn. A search has none of the
    # measures.
    figure: str = "bits_per_byte"
    # Further figures of a trained model, names in measures.MEASURES; not of runs that only search.
    measures: tuple[str, ...] = ()
    # Further figures that follow from the config of a run and its figures.
    derived: Mapping[str, Callable[[Config, Figures], float]] = dataclasses.field(
        default_factory=dict
    )
    # Further columns of the table, names of figures.
    columns: tuple[str, ...] = ()
    # Where arms stand on the x axis, and what that axis is; none: side by side.
    x: Mapping[str, float] = dataclasses.field(default_factory=dict)
    x_label: str = ""

    def searches(self, arm: str) -> bool:
        """Returns whether the learning rate of an arm is searched."""
        return RATE not in self.arms[arm] and RATE not in self.base


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: an arm with a seed and a learning rate.

    Fields:
      raw: the config as a nested dict of JSON values.
      key: SHA-256 of all that decides the figures; equal cells of two studies are one run.
      config: the values that decide them, defaults too (expand.values_of).
      program: the same without seed and learning rate: cells that share it are compiled once.
      seconds: how long it is expected to take.
      parent: the run of the dense model that it begins from; None = it begins from fresh values.
    """

    arm: str
    seed: int
    rate: float
    raw: Mapping[str, Any]
    measures: tuple[str, ...]
    key: str
    config: Mapping[str, Any]
    program: str
    seconds: float
    parent: "Cell | None" = None
